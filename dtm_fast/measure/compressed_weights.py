"""Compressed weights, packed for the fused kernel; the ones used last are kept."""

from collections import OrderedDict

import torch
from torch import Tensor

from dtm_fast.compression import Treatment, compressed_weight
from dtm_fast.model import Component
from dtm_fast.ops.layer_weights import Arithmetic, PackedMatrix

_Key = tuple[str, str, Arithmetic, str]


class CompressedWeights:
    """What treatments make of weights.

    Args:
        bound: bytes of packed weights to keep at most.
    """

    def __init__(self, bound: int = 176 * 2**20) -> None:
        """Holds nothing yet."""
        self._bound = bound
        self._size = 0
        self._known: OrderedDict[_Key, tuple[PackedMatrix, PackedMatrix | None]] = OrderedDict()

    @torch.no_grad()
    def packed(
        self,
        component: Component,
        treatment: Treatment | None,
        arithmetic: Arithmetic,
        base: Treatment | None = None,
    ) -> tuple[PackedMatrix, PackedMatrix | None]:
        """The compressed weight, and for differences what it is more than that of the base; None: the original."""
        key = (component.path, _name(treatment), arithmetic, _name(base))
        if key in self._known:
            self._known.move_to_end(key)
            return self._known[key]
        compressed = _compressed(component, treatment)
        change = None
        if arithmetic.is_change:
            change = PackedMatrix.pack(compressed - _compressed(component, base), arithmetic)
        pair = (PackedMatrix.pack(compressed, arithmetic), change)
        self._known[key] = pair
        self._size += _bytes(pair)
        while self._size > self._bound and len(self._known) > 1:
            self._size -= _bytes(self._known.popitem(last=False)[1])
        return pair


def _compressed(component: Component, treatment: Treatment | None) -> Tensor:
    return (component.weight if treatment is None else compressed_weight(component, treatment)).float()


def _name(treatment: Treatment | None) -> str:
    return "" if treatment is None else treatment.key


def _bytes(pair: tuple[PackedMatrix, PackedMatrix | None]) -> int:
    return sum(each.nbytes for each in pair if each is not None)
