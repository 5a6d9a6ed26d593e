"""FDT alone: probes leave once they diverge, and exact arithmetic is spent only on what is in doubt."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dtm_fast.compression import Configuration, Name, name_of
from dtm_fast.errors import MeasurementError
from dtm_fast.measure.complete_pass import Columns
from dtm_fast.measure.difference_error import changes_much, error_of
from dtm_fast.measure.doubts import Doubt, settle
from dtm_fast.measure.first_divergence import FirstDivergence, first_divergence
from dtm_fast.measure.part_layers import PartHead, PartLayers
from dtm_fast.measure.prefix_tree import Node, first_difference, layers_of, tree_of, walk
from dtm_fast.measure.racing import Contest, Dropped
from dtm_fast.ops.layer_weights import Arithmetic

Results = Iterator[tuple[list[int], Columns | Dropped | MeasurementError]]

_DOUBTS = 48  # so many probes are computed exactly together


@dataclass(frozen=True, eq=False)
class _Waiting:
    """A configuration of which some probes are in doubt."""

    indices: list[int]
    configuration: Configuration
    found: FirstDivergence
    doubts: list[Doubt]


class FirstPass:
    """Measures FDT of configurations on layers that run in parts.

    Args:
        layers: run.
        head: decides.
        prefix: n of the probes.
        scale: how many times ``error_of`` differences may err on this model (``error_scale``); None: they are not used.
    """

    def __init__(self, layers: PartLayers, head: PartHead, prefix: int, scale: float | None = 1.0) -> None:
        """Measures nothing yet."""
        self._layers = layers
        self._head = head
        self._prefix = prefix
        self._scale = scale or 1.0
        self._fastest = layers.exact if scale is None else layers.arithmetic
        self._completion = layers.positions + 1 - prefix
        self.layer_evaluations = 0
        """Layers run so far."""
        self.doubts = 0
        """Probes computed exactly so far, because their decision was in doubt."""

    @torch.no_grad()
    def results(self, configurations: Sequence[Configuration], contest: Contest | None = None) -> Results:
        """FDT and lead of each configuration, or why there are none, with the indices of those that equal it.

        Args:
            configurations: none of them empty.
            contest: says whom to drop; it is told of everyone who was measured.
        """
        for arithmetic in (self._fastest, self._layers.exact):
            chosen = [i for i, c in enumerate(configurations) if self._arithmetic_of(c) == arithmetic]
            if not chosen:
                continue
            for indices, result in self._walked([configurations[i] for i in chosen], arithmetic, contest):
                yield [chosen[index] for index in indices], result
            if self._fastest == self._layers.exact:
                return

    def _arithmetic_of(self, configuration: Configuration) -> Arithmetic:
        """What the kernels do not know is not computed by differences either."""
        known = self._layers.can_run_in_parts(configuration)
        return self._fastest if known else self._layers.exact

    def _walked(
        self, configurations: Sequence[Configuration], arithmetic: Arithmetic, contest: Contest | None
    ) -> Results:
        def advance(node: Node, state: Tensor | None) -> Tensor:
            self.layer_evaluations += 1
            everyone = range(self._layers.count)
            return self._layers.run(node.layer - 1, node.treatments, state, arithmetic, everyone)

        waiting: list[_Waiting] = []
        handed = (
            each
            for root in self._trees(configurations)
            for each in walk(root, None, advance, stop_at_chains=True)
        )
        for node, state in handed if contest is None else _in_turn(handed, configurations, contest):
            chain = node.chain()
            indices = chain[-1].ends
            if isinstance(state, MeasurementError):
                yield indices, state
                continue
            steps = [(each.layer - 1, each.treatments) for each in chain if not each.is_base]
            configuration = configurations[indices[0]]
            if contest is not None:
                unread = FirstDivergence.unknown(self._layers.count, self._completion)
                if (lost := contest.why_lost(configuration, unread)) is not None:
                    yield indices, lost
                    continue
            by_layer = layers_of(self._layers.decoder, configuration)
            start = first_difference(by_layer, self._layers.treatments, self._layers.depth)
            its = arithmetic
            if arithmetic.is_change and changes_much(self._layers, by_layer):
                its, state = self._layers.exact, None
                steps = [(layer, by_layer.get(layer, {})) for layer in range(start, self._layers.depth)]
            error = self._scale * error_of(its, self._layers.depth - start, self._layers.shape.hidden)
            self.layer_evaluations += len(steps)
            referee = None if contest is None else contest.referee(configuration)
            try:
                found = first_divergence(
                    self._layers, self._head, state, steps, its, self._prefix, error, referee
                )
            except MeasurementError as failure:
                yield indices, failure
                continue
            if referee is not None and referee.lost is not None:
                yield indices, referee.lost
                continue
            doubts = [
                Doubt(by_layer, start, probe, positions, found)
                for probe, positions in found.uncertain.items()
            ]
            waiting.append(_Waiting(indices, configuration, found, doubts))
            # Where products round by their shape, configurations are not settled together.
            full = _DOUBTS if self._layers.shares_parts else 1
            if not doubts or sum(len(each.doubts) for each in waiting) >= full:
                ready = waiting if doubts else [waiting.pop()]
                yield from self._settled(ready, contest)
                waiting = [] if doubts else waiting
        yield from self._settled(waiting, contest)

    def _trees(self, configurations: Sequence[Configuration]) -> list[Node]:
        """One of all, or where they may share nothing one of each, those of the same layers one after the other."""
        decoder, treatments = self._layers.decoder, self._layers.treatments
        if self._layers.shares_parts:
            return [tree_of(decoder, configurations, treatments)]
        equals: dict[Name, list[int]] = {}
        for index, configuration in enumerate(configurations):
            equals.setdefault(name_of(configuration), []).append(index)
        trees: list[tuple[int, Node]] = []
        for indices in equals.values():
            configuration = configurations[indices[0]]
            root = tree_of(decoder, [configuration], treatments)
            root.chain()[-1].ends = indices
            start = first_difference(layers_of(decoder, configuration), treatments, self._layers.depth)
            trees.append((start, root))
        return [root for _, root in sorted(trees, key=lambda each: each[0])]

    def _settled(self, waiting: list[_Waiting], contest: Contest | None) -> Results:
        doubts = [doubt for each in waiting for doubt in each.doubts]
        try:
            settle(self._layers, self._head, doubts, self._prefix, self._scale)
        except MeasurementError as failure:
            if len(waiting) == 1:
                yield waiting[0].indices, failure
                return
            for each in waiting:  # alone, to see whose failure it is
                yield from self._settled([each], contest)
            return
        self.doubts += len(doubts)
        for each in waiting:
            if contest is not None:
                contest.take(each.configuration, each.found.fdt)
            yield each.indices, _columns(each.found)


def _in_turn(
    handed: Iterator[tuple[Node, Tensor | MeasurementError | None]],
    configurations: Sequence[Configuration],
    contest: Contest,
) -> Iterator[tuple[Node, Tensor | MeasurementError | None]]:
    """The same with those that start at the base's state last, in the contest's order."""

    def turn(node: Node) -> tuple[Name, int]:
        index = node.chain()[-1].ends[0]
        return contest.turn(index, configurations[index])

    waiting: list[Node] = []
    for node, state in handed:
        if state is None:
            waiting.append(node)
        else:
            yield node, state
    waiting.sort(key=turn)
    yield from ((node, None) for node in waiting)


def _columns(found: FirstDivergence) -> Columns:
    return {"fdt": found.fdt, "first_lead": found.lead}
