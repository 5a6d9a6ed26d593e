"""FDT of one configuration: completions in parts, and probes leave once they diverge."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from dtm_fast.compression import Configuration
from dtm_fast.measure.head import Decisions
from dtm_fast.measure.part_layers import PartHead, PartLayers
from dtm_fast.ops.layer_weights import Arithmetic

Steps = Sequence[tuple[int, Configuration]]
"""Layers to run, in order, and what is done to the components of each."""


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
            torch.full((probes,), torch.nan, dtype=torch.float32),
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
    layers: PartLayers,
    head: PartHead,
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
    parts = _parts(layers, head, completion, referee is not None)
    groups: Sequence[Sequence[int]] = [range(layers.count)] if referee is None else referee.groups
    if not all(layers.can_run_in_parts(treatments) for _, treatments in steps):
        parts, groups = [[completion] * layers.count], [range(layers.count)]
    for group in groups:
        alive, begins = list(group), [0] * layers.count
        for stops in parts:
            read = [probe for probe in alive if begins[probe] < stops[probe]]
            if not read:
                continue
            # What some of them have seen before comes out as it was.
            begin, stop = min(begins[probe] for probe in read), max(stops[probe] for probe in read)
            first, end = (0 if begin == 0 else prefix - 1 + begin), prefix - 1 + stop
            lengths = [prefix - 1 + stops[probe] - first for probe in read]
            x = None if state is None else state[read, first:end].contiguous()
            for layer, treatments in steps:
                wanted = prefix - 1 if layer == layers.depth - 1 else 0
                x = layers.run(
                    layer, treatments, x, arithmetic, read, first, end, first_output=wanted, lengths=lengths
                )
            at = prefix - 1 + begin
            if x is not None:
                x = x[:, at - first :]
                for row, probe in enumerate(read):  # what was not run decides nothing, but must be finite
                    if stops[probe] == stop:
                        continue
                    unread = slice(stops[probe] - begin, None)
                    x[row, unread] = (
                        0 if arithmetic.is_change else layers.base(layers.depth, [probe], at, end)[0, unread]
                    )
            hidden = layers.head_input(x, arithmetic, read, at, end)
            decided = head.decide(hidden, read, begin, error, until_mismatch=True).cpu()
            diverged = _take_in(found, decided, read, begin, begins, stops)
            alive = [probe for probe in alive if probe not in diverged]
            begins = [max(own) for own in zip(begins, stops, strict=True)]
            if referee is not None and not referee.goes_on(found):
                return found
    return found


def _parts(layers: PartLayers, head: PartHead, completion: int, has_referee: bool) -> list[list[int]]:
    """In which parts the completions are read: for each part, the position behind its last one, of every probe."""
    if layers.treatments and layers.shares_parts and not has_referee:
        # A base that diverges: what differs a little from it mostly diverges there, too.
        own = [min(at + 1, completion) for at in head.base_divergence]
        return [own, [completion] * layers.count]
    return [[int(completion * share)] * layers.count for share in layers.shares(has_referee)]


def _take_in(
    found: FirstDivergence,
    decided: Decisions,
    read: Sequence[int],
    first: int,
    begins: Sequence[int],
    stops: Sequence[int],
) -> set[int]:
    """Adds what was decided of the probes ``read`` to what is found; returns who has certainly diverged.

    Args:
        found: added to.
        decided: from position ``first`` of the completions on.
        read: whose decisions these are.
        first: a position.
        begins: of every probe, the first position that is new.
        stops: of every probe, the position behind the last one that was run.
    """
    diverged = set()
    sure = decided.mismatch & decided.certain
    for row, probe in enumerate(read):
        end = stops[probe] - first
        if bool(sure[row, :end].any()):
            end = int(sure[row].int().argmax())
            found.fdt[probe], found.lead[probe] = first + end, decided.lead[row, end]
            diverged.add(probe)
        found.seen[probe] = first + end
        new = slice(begins[probe] - first, end)
        doubtful = (~decided.certain[row, new]).nonzero()[:, 0] + begins[probe]
        if len(doubtful):
            found.uncertain.setdefault(probe, []).extend(doubtful.tolist())
    return diverged
