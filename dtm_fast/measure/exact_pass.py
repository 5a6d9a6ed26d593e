"""What a fast arithmetic left uncertain, computed exactly: the probes of many configurations in one pass."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from dtm_fast.compression import Configuration
from dtm_fast.measure.first_divergence import FirstDivergence
from dtm_fast.measure.fused_layers import FusedLayers
from dtm_fast.measure.head import Head


@dataclass(frozen=True, eq=False)
class Doubt:
    """One probe of one configuration.

    Attributes:
        by_layer: what is done to the components of each layer, for those that are treated.
        probe: which.
        last: the last position of its completion that is in doubt.
        found: where the exact answer goes.
    """

    by_layer: Mapping[int, Configuration]
    probe: int
    last: int
    found: FirstDivergence


@torch.no_grad()
def settle(layers: FusedLayers, head: Head, doubts: Sequence[Doubt], prefix: int) -> None:
    """Corrects FDT and lead where exact arithmetic says otherwise.

    Layer by layer: from its first treated layer on, every doubt takes part, and those for which a layer is the same
    go through it together.
    """
    if not doubts:
        return
    lengths = [prefix + doubt.last for doubt in doubts]  # the last position predicts the token behind it
    end = max(lengths)
    x = torch.zeros(len(doubts), end, layers.shape.hidden)
    kv = layers.new_kv(len(doubts))
    starts = [min(doubt.by_layer) for doubt in doubts]
    for layer in range(min(starts), layers.depth):
        groups: dict[tuple[tuple[str, str], ...], list[int]] = defaultdict(list)
        for index, doubt in enumerate(doubts):
            if starts[index] <= layer:
                groups[_key(doubt.by_layer.get(layer, {}))].append(index)
        for members in groups.values():
            entering = [index for index in members if starts[index] == layer]
            if entering:
                x[entering] = layers.base(layer, [doubts[index].probe for index in entering], 0, end)
            x[members] = layers.run(
                layer,
                doubts[members[0]].by_layer.get(layer, {}),
                x[members],
                layers.exact,
                [doubts[index].probe for index in members],
                0,
                end,
                lengths=[lengths[index] for index in members],
                kv=kv,
            )
    for index, doubt in enumerate(doubts):
        state = x[index : index + 1, prefix - 1 : lengths[index]]
        hidden = layers.head_input(state, layers.exact, [doubt.probe], prefix - 1, lengths[index])
        decided = head.decide(hidden, [doubt.probe], 0)
        if bool(decided.mismatch.any()):
            at = int(decided.mismatch[0].int().argmax())
            doubt.found.fdt[doubt.probe], doubt.found.lead[doubt.probe] = at, decided.lead[0, at]


def _key(treatments: Configuration) -> tuple[tuple[str, str], ...]:
    return tuple(sorted((path, treatment.key) for path, treatment in treatments.items()))
