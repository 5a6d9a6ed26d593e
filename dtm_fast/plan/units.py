"""What a search treats together: single components, or those that a serving engine multiplies by as one matrix."""

from typing import TypeAlias

from dtm_fast.model import Decoder

Unit: TypeAlias = tuple[str, ...]
"""Components that get the same treatment or none, by their paths in depth order."""

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""vLLM's name of a layer → the modules of a checkpoint that it holds as one matrix."""


def units(decoder: Decoder, fused: bool = False) -> list[Unit]:
    """All components in units, in depth order; each is in one.

    vLLM and SGLang hold q, k and v of a layer as one matrix, and gate and up as another, and read one scheme for each
    from a checkpoint's quantization config: a set of which the parts have different schemes, or of which some are to be
    ignored, is refused or loaded wrongly. What is to be served there is searched with ``fused``, so that no plan treats
    half of such a set.

    Args:
        decoder: whose components.
        fused: q_proj, k_proj and v_proj of one attention module together, and gate_proj and up_proj of one MLP.
            Components of other names stay single: those that the model itself holds as one matrix (Phi-3's qkv_proj)
            need nothing, and of names that are not known nothing is assumed. False: every component is a unit.

    Returns:
        A unit stands where its first component does.
    """
    layers = {name: layer for layer, names in FUSED.items() for name in names} if fused else {}
    found: dict[tuple[str, str], list[str]] = {}
    for path in decoder.components:
        parent, _, name = path.rpartition(".")
        found.setdefault((parent, layers.get(name, name)), []).append(path)
    return [tuple(paths) for paths in found.values()]
