"""What a fast arithmetic left uncertain, computed finer: the probes of many configurations in one pass."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from dtm_fast.compression import Configuration, Name, name_of
from dtm_fast.measure.difference_error import error_of
from dtm_fast.measure.first_divergence import FirstDivergence
from dtm_fast.measure.part_layers import PartHead, PartLayers
from dtm_fast.ops.layer_weights import Arithmetic


@dataclass(frozen=True, eq=False)
class Doubt:
    """One probe of one configuration.

    Attributes:
        by_layer: what is done to the components of each layer, for those that are treated.
        start: the first layer that differs from the base's.
        probe: which.
        positions: of its completion that are in doubt, in order; no other one before its FDT is.
        found: where the answer goes.
    """

    by_layer: Mapping[int, Configuration]
    start: int
    probe: int
    positions: Sequence[int]
    found: FirstDivergence


def settle(
    layers: PartLayers, head: PartHead, doubts: Sequence[Doubt], prefix: int, scale: float = 1.0
) -> None:
    """Corrects FDT and lead where finer arithmetic says otherwise, the exact one where nothing else is certain.

    ``scale``: how many times ``error_of`` differences may err.
    """
    for arithmetic in layers.finer:
        doubts = _settled_by(arithmetic, layers, head, doubts, prefix, scale)
    assert not doubts, "the last arithmetic is exact"


@torch.no_grad()
def _settled_by(
    arithmetic: Arithmetic,
    layers: PartLayers,
    head: PartHead,
    doubts: Sequence[Doubt],
    prefix: int,
    scale: float,
) -> list[Doubt]:
    """Corrects what this arithmetic is certain of, and returns what is still in doubt.

    Layer by layer: from its first layer that differs on, every doubt takes part, and those for which a layer is the
    same go through it together.
    """
    if not doubts:
        return []
    lengths = [prefix + doubt.positions[-1] for doubt in doubts]  # a position predicts the token behind it
    end = max(lengths)
    device = layers.decoder.model.device
    x = torch.zeros(len(doubts), end, layers.shape.hidden, dtype=torch.float32, device=device)
    kv = layers.new_kv(len(doubts))
    starts = [doubt.start for doubt in doubts]
    for layer in range(min(starts), layers.depth):
        groups: dict[Name, list[int]] = defaultdict(list)
        for index, doubt in enumerate(doubts):
            if starts[index] <= layer:
                groups[name_of(doubt.by_layer.get(layer, {}))].append(index)
        for members in groups.values():
            entering = [index for index in members if starts[index] == layer]
            if entering and not arithmetic.is_change:
                x[entering] = layers.base(layer, [doubts[index].probe for index in entering], 0, end)
            x[members] = layers.run(
                layer,
                doubts[members[0]].by_layer.get(layer, {}),
                x[members],
                arithmetic,
                [doubts[index].probe for index in members],
                0,
                end,
                lengths=[lengths[index] for index in members],
                kv=kv,
            )
    places = [(doubt, index, position) for index, doubt in enumerate(doubts) for position in doubt.positions]
    hidden, errors = [], []
    for doubt, index, position in places:
        at = prefix - 1 + position
        state = x[index : index + 1, at : at + 1]
        hidden.append(layers.head_input(state, arithmetic, [doubt.probe], at, at + 1)[0])
        errors.append(scale * error_of(arithmetic, layers.depth - doubt.start, layers.shape.hidden))
    probes, positions = [doubt.probe for doubt, _, _ in places], [position for _, _, position in places]
    decided = head.decide_at(torch.cat(hidden), probes, positions, errors).cpu()
    left = []
    counts = [len(doubt.positions) for doubt in doubts]
    columns = (each.split(counts) for each in (decided.mismatch, decided.certain, decided.lead))
    for doubt, mismatch, certain, lead in zip(doubts, *columns, strict=True):
        sure = mismatch & certain
        at = int(sure.int().argmax()) if bool(sure.any()) else len(sure)
        if at < len(sure):
            doubt.found.fdt[doubt.probe], doubt.found.lead[doubt.probe] = doubt.positions[at], lead[at]
        uncertain = (~certain[:at]).nonzero()[:, 0].tolist()
        if uncertain:
            left.append(replace(doubt, positions=[doubt.positions[each] for each in uncertain]))
    return left
