"""How large a compressed model's components are, as they would be kept to be run from."""

from math import prod

from dtm_fast.compression.configuration import Configuration
from dtm_fast.compression.treatments import KEPT_BITS
from dtm_fast.model import Decoder


def configuration_bits(decoder: Decoder, configuration: Configuration) -> int:
    """Bits of all components' weights; those that the configuration does not name take 16 for each.

    Embeddings, norms and the head are not counted: no treatment changes them.
    """
    return sum(
        configuration[path].bits(*component.shape)
        if path in configuration
        else KEPT_BITS * prod(component.shape)
        for path, component in decoder.components.items()
    )


def effective_bits(decoder: Decoder, configuration: Configuration) -> float:
    """``configuration_bits`` for each weight of the components: 16 for the model as it is."""
    return configuration_bits(decoder, configuration) / sum(c.numel for c in decoder.components.values())
