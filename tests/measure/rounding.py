"""What of a measurement in bfloat16 may be rounding, said by the model alone and not by the layers under test."""

import copy
import math
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

import dtm_fast as dtm
from dtm_fast.measure.floor import self_divergence
from dtm_fast.measure.forward import lead, logits_before


@torch.no_grad()
def rounding_of(model: PreTrainedModel, probes: dtm.Probes) -> float:
    """What moves a decision of the model itself, in logits: another batch shape, float32, and a step of bfloat16."""
    n = probes.prefix
    logits, finer = (logits_before(each, probes.tokens, n) for each in (model, copy.deepcopy(model).float()))
    moved = lead(logits, probes.tokens[:, n:]) - lead(finer, probes.tokens[:, n:])
    step = math.ldexp(1, math.frexp(float(logits.abs().max()))[1] - 8)  # bfloat16 has eight bits
    return self_divergence(model, probes).margin + float(moved.abs().max()) + step


def assert_within_rounding(
    found: Sequence[dtm.Measurement], expected: Sequence[dtm.Measurement], bound: float
) -> None:
    """Where one diverges and the other does not, no more than ``bound`` logits decided."""
    for ours, other in zip(found, expected, strict=True):
        differs = ours.fdt != other.fdt
        earlier = torch.where(ours.fdt < other.fdt, ours.first_margin, other.first_margin)
        assert bool((earlier[differs] <= bound).all()), (float(earlier[differs].max()), bound)
