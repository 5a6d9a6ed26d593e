"""How large a compressed model's components are, as they would be kept to be run from."""

from collections.abc import Mapping
from math import prod

from dtm_fast.compression.configuration import Configuration
from dtm_fast.compression.treatment import KEPT_BITS
from dtm_fast.model import Decoder

Shapes = Mapping[str, tuple[int, int]]
"""Component → (N, K)."""


def shapes_of(decoder: Decoder) -> dict[str, tuple[int, int]]:
    """The shape of every component."""
    return {path: component.shape for path, component in decoder.components.items()}


def configuration_bits(shapes: Shapes, configuration: Configuration) -> int:
    """Bits of all components' weights; those that the configuration does not name take 16 for each weight.

    Embeddings, norms and the head are not counted: no treatment changes them.
    """
    return sum(
        configuration[path].bits(*shape) if path in configuration else KEPT_BITS * prod(shape)
        for path, shape in shapes.items()
    )


def effective_bits(shapes: Shapes, configuration: Configuration) -> float:
    """``configuration_bits`` for each weight of the components: 16 for the model as it is."""
    return configuration_bits(shapes, configuration) / sum(map(prod, shapes.values()))
