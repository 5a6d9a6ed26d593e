"""Compressed weights, packed for the fused kernel; the ones used last are kept."""

import math
from collections import OrderedDict

import torch
from torch import Tensor

from dtm_fast.compression import Treatment, compressed_weight, key_of
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
        self._changes: dict[_Key, float] = {}

    @torch.no_grad()
    def packed(
        self,
        component: Component,
        treatment: Treatment | None,
        arithmetic: Arithmetic,
        base: Treatment | None = None,
    ) -> tuple[PackedMatrix, PackedMatrix | None]:
        """The compressed weight, and for differences what it is more than that of the base; None: the original."""
        key = (component.path, key_of(treatment), arithmetic, key_of(base))
        if key in self._known:
            self._known.move_to_end(key)
            return self._known[key]
        compressed = _compressed(component, treatment)
        change = None
        if arithmetic.is_change:
            of_base = _compressed(component, base)
            difference = compressed - of_base
            self._changes[key] = relative_change(difference, of_base)
            change = PackedMatrix.pack(difference, arithmetic)
        pair = (PackedMatrix.pack(compressed, arithmetic), change)
        self._known[key] = pair
        self._size += _bytes(pair)
        while self._size > self._bound and len(self._known) > 1:
            self._size -= _bytes(self._known.popitem(last=False)[1])
        return pair

    def relative_change(
        self,
        component: Component,
        treatment: Treatment | None,
        arithmetic: Arithmetic,
        base: Treatment | None = None,
    ) -> float:
        """``‖W' - W‖ / ‖W‖``, where W is the base's weight; arguments as ``packed``, by differences."""
        key = (component.path, key_of(treatment), arithmetic, key_of(base))
        if key not in self._changes:
            self.packed(component, treatment, arithmetic, base)
        return self._changes[key]


def relative_change(difference: Tensor, weight: Tensor) -> float:
    """``‖difference‖ / ‖weight‖``; 0 where nothing differs, and infinite where only the weight is 0."""
    change, size = (
        float(torch.linalg.vector_norm(each, dtype=torch.float32)) for each in (difference, weight)
    )
    if change == 0:
        return 0.0
    return change / size if size else math.inf


def _compressed(component: Component, treatment: Treatment | None) -> Tensor:
    return (component.weight if treatment is None else compressed_weight(component, treatment)).float()


def _bytes(pair: tuple[PackedMatrix, PackedMatrix | None]) -> int:
    return sum(each.nbytes for each in pair if each is not None)
