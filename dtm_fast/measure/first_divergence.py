"""FDT of one configuration on the fused layers: completions in parts, and probes leave once they diverge."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dtm_fast.compression import Configuration
from dtm_fast.measure.fused_layers import FusedLayers
from dtm_fast.measure.head import Head
from dtm_fast.ops.decoder_layer import Arithmetic

# By how much CHANGE may misjudge the distance of a hidden state to the border of a decision, in units of how far that
# state is from the base's. Measured on SmolLM2 (28 single components, 22,400 positions): after 1, 14 and 29 layers
# the median error is 0.6, 1.4 and 1.9e-4, the 99.9th percentile 5, 15 and 29e-4, the largest 5, 26 and 35e-4. What
# is allowed here is 1.5 to 2 times that percentile. An error that points anywhere has a share of 1 / sqrt(D) in the
# direction that counts: a smaller hidden size than SmolLM2's is allowed more.
_ERROR = 8e-4
_ERROR_OF_A_LAYER = 1.6e-4
_MEASURED_HIDDEN = 576

_PARTS = 4  # the completion is read in so many parts

Steps = Sequence[tuple[int, Configuration]]
"""Layers to run, in order, and what is done to the components of each."""


def error_of(arithmetic: Arithmetic, layers: int, hidden: int) -> float:
    """How far a distance to a decision may be off after so many layers of this hidden size."""
    if arithmetic != Arithmetic.CHANGE:
        return 0.0
    return (_ERROR + _ERROR_OF_A_LAYER * layers) * max(1.0, math.sqrt(_MEASURED_HIDDEN / hidden))


@dataclass(eq=False)
class FirstDivergence:
    """FDT of P probes, as far as it is known.

    Attributes:
        fdt: int64 [P], N where none diverges.
        lead: float32 [P], by how many logits the base's token wins there (it loses); NaN where none diverges.
        uncertain: probe → the last position of its completion, before its FDT, that the arithmetic's error may have
            decided: so far it must be computed exactly.
    """

    fdt: Tensor
    lead: Tensor
    uncertain: dict[int, int] = field(default_factory=dict)


@torch.no_grad()
def first_divergence(
    layers: FusedLayers,
    head: Head,
    state: Tensor | None,
    steps: Steps,
    arithmetic: Arithmetic,
    prefix: int,
    error: float,
) -> FirstDivergence:
    """Runs the last layers of a configuration on all probes until each diverges.

    Args:
        layers: run.
        head: decides.
        state: of all probes and positions, before the first of ``steps``; None is the base's.
        steps: the layers that are left.
        arithmetic: of ``state`` and of what follows.
        prefix: n of the probes.
        error: of the arithmetic, as ``Head.decide`` takes it.
    """
    N = layers.positions + 1 - prefix  # noqa: N806
    found = FirstDivergence(torch.full((layers.count,), N), torch.full((layers.count,), torch.nan))
    alive = list(range(layers.count))
    parts = _PARTS if all(layers.can_run_in_parts(treatments) for _, treatments in steps) else 1
    for part in range(parts):
        begin, stop = part * N // parts, (part + 1) * N // parts
        if not alive or begin == stop:
            continue
        first, end = (0 if begin == 0 else prefix - 1 + begin), prefix - 1 + stop
        x = None if state is None else state[alive, first:end].contiguous()
        for layer, treatments in steps:
            last = layer == layers.depth - 1
            x = layers.run(
                layer, treatments, x, arithmetic, alive, first, end, first_output=prefix - 1 if last else 0
            )
        at = prefix - 1 + begin
        x = None if x is None else x[:, at - first :]
        decided = head.decide(layers.head_input(x, arithmetic, alive, at, end), alive, begin, error)
        alive = _take_in(found, decided.mismatch, decided.certain, decided.lead, alive, begin)
    return found


def _take_in(
    found: FirstDivergence, mismatch: Tensor, certain: Tensor, lead: Tensor, alive: list[int], begin: int
) -> list[int]:
    """Adds the decisions of a part to what is found; returns who has not certainly diverged."""
    going_on = []
    sure = mismatch & certain
    for row, probe in enumerate(alive):
        end = mismatch.shape[1]
        if bool(sure[row].any()):
            end = int(sure[row].int().argmax())
            found.fdt[probe], found.lead[probe] = begin + end, lead[row, end]
        else:
            going_on.append(probe)
        doubtful = (~certain[row, :end]).nonzero()
        if len(doubtful):
            found.uncertain[probe] = begin + int(doubtful[-1])
    return going_on
