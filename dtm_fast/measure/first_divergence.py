"""FDT of one configuration on the fused layers: completions in parts, and probes leave once they diverge."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from dtm_fast.compression import Configuration
from dtm_fast.measure.fused_layers import FusedLayers
from dtm_fast.measure.head import Decisions, Head
from dtm_fast.ops.decoder_layer import Arithmetic

# By how much CHANGE may misjudge the distance of a hidden state to the border of a decision, in units of how far that
# state is from the base's. Measured on SmolLM2 (28 single components, 22,400 positions): after 1, 14 and 29 layers
# the median error is 0.6, 1.4 and 1.9e-4, the 99.9th percentile 5, 15 and 29e-4, the largest 5, 26 and 35e-4. What
# is allowed here is 1.5 to 2 times that percentile. An error that points anywhere has a share of 1 / sqrt(D) in the
# direction that counts: a smaller hidden size than SmolLM2's is allowed more. FINE_CHANGE, which rounds to 2^-17
# instead of 2^-9, errs by 0.4 and 3e-5 after 30 layers of a pruned component (the same percentiles); of smaller changes
# what float32 loses of the states is the larger part, as in the exact arithmetic.
_ERROR = 8e-4
_ERROR_OF_A_LAYER = 1.6e-4
_MEASURED_HIDDEN = 576
_FINENESS = 2**-7

# In which parts a completion is read, as shares of it. Each part makes the weights come anew, which takes as long as
# some hundred positions; on SmolLM2, of 1 to 4 parts two were best for changes small and large. A referee may stop
# after each.
_PARTS = (0, 1 / 3, 1)
_PARTS_WITH_REFEREE = (0, 1 / 4, 2 / 4, 3 / 4, 1)

Steps = Sequence[tuple[int, Configuration]]
"""Layers to run, in order, and what is done to the components of each."""


def error_of(arithmetic: Arithmetic, layers: int, hidden: int) -> float:
    """How far a distance to a decision may be off after so many layers of this hidden size."""
    if not arithmetic.is_change:
        return 0.0
    error = (_ERROR + _ERROR_OF_A_LAYER * layers) * max(1.0, math.sqrt(_MEASURED_HIDDEN / hidden))
    return error * _FINENESS if arithmetic == Arithmetic.FINE_CHANGE else error


@dataclass(eq=False)
class FirstDivergence:
    """FDT of P probes, as far as it is known.

    Attributes:
        completion: N.
        fdt: int64 [P], N where none was found to diverge.
        lead: float32 [P], by how many logits the base's token wins there (it loses); NaN where none diverges.
        seen: int64 [P], how many positions of the completion were read; no more are read after a divergence.
        uncertain: probe → positions of its completion, before its FDT, that the arithmetic's error may have decided,
            in order.
    """

    completion: int
    fdt: Tensor
    lead: Tensor
    seen: Tensor
    uncertain: dict[int, list[int]] = field(default_factory=dict)

    @classmethod
    def unknown(cls, probes: int, completion: int) -> "FirstDivergence":
        """Nothing was read yet."""
        return cls(
            completion,
            torch.full((probes,), completion),
            torch.full((probes,), torch.nan),
            torch.zeros(probes, dtype=torch.int64),
        )

    def bounds(self) -> tuple[Tensor, Tensor]:
        """The lowest and the highest FDT that each probe can have, int64 [P]."""
        lowest = torch.where(self.fdt < self.completion, self.fdt, self.seen)
        for probe, positions in self.uncertain.items():
            lowest[probe] = min(int(lowest[probe]), positions[0])
        return lowest, self.fdt


class Referee(Protocol):
    """Says in which order to read the probes of a configuration, and when it was read enough."""

    @property
    def groups(self) -> Sequence[Sequence[int]]:
        """All probes, in the groups in which they are read one after the other."""
        ...

    def goes_on(self, found: FirstDivergence) -> bool:
        """Whether to read on; asked after every part."""
        ...


@torch.no_grad()
def first_divergence(
    layers: FusedLayers,
    head: Head,
    state: Tensor | None,
    steps: Steps,
    arithmetic: Arithmetic,
    prefix: int,
    error: float,
    referee: Referee | None = None,
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
        referee: in which groups to read the probes, and whether to go on after each part; by default all, to the
            end.
    """
    completion = layers.positions + 1 - prefix
    found = FirstDivergence.unknown(layers.count, completion)
    shares: Sequence[float] = _PARTS if referee is None else _PARTS_WITH_REFEREE
    groups: Sequence[Sequence[int]] = [range(layers.count)] if referee is None else referee.groups
    if not all(layers.can_run_in_parts(treatments) for _, treatments in steps):
        shares, groups = (0, 1), [range(layers.count)]
    for group in groups:
        alive = list(group)
        for begin, stop in pairwise(int(completion * share) for share in shares):
            if not alive or begin == stop:
                continue
            first, end = (0 if begin == 0 else prefix - 1 + begin), prefix - 1 + stop
            x = None if state is None else state[alive, first:end].contiguous()
            for layer, treatments in steps:
                wanted = prefix - 1 if layer == layers.depth - 1 else 0
                x = layers.run(layer, treatments, x, arithmetic, alive, first, end, first_output=wanted)
            at = prefix - 1 + begin
            x = None if x is None else x[:, at - first :]
            hidden = layers.head_input(x, arithmetic, alive, at, end)
            decided = head.decide(hidden, alive, begin, error, until_mismatch=True)
            alive = _take_in(found, decided, alive, begin)
            if referee is not None and not referee.goes_on(found):
                return found
    return found


def _take_in(found: FirstDivergence, decided: Decisions, alive: list[int], begin: int) -> list[int]:
    """Adds the decisions of a part to what is found; returns who has not certainly diverged."""
    going_on = []
    sure = decided.mismatch & decided.certain
    for row, probe in enumerate(alive):
        end = sure.shape[1]
        if bool(sure[row].any()):
            end = int(sure[row].int().argmax())
            found.fdt[probe], found.lead[probe] = begin + end, decided.lead[row, end]
        else:
            going_on.append(probe)
        found.seen[probe] = begin + end
        doubtful = (~decided.certain[row, :end]).nonzero()[:, 0] + begin
        if len(doubtful):
            found.uncertain.setdefault(probe, []).extend(doubtful.tolist())
    return going_on
