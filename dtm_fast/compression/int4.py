"""Weights to int4, rounded to nearest."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dtm_fast.compression.treatment import Treatment
from dtm_fast.errors import TreatmentError
from dtm_fast.model import InputStatistics
from dtm_fast.ops import checks

_LEVELS = 15
"""Steps between the least and the most of 4 bits."""


@dataclass(frozen=True)
class Grid:
    """The 16 values that weights of a group can take: ``(q - zero_point) * scale``, q in 0 … 15.

    Zero is among them, and up to rounding the least and the greatest weight, or zero in place of one of them.

    Attributes:
        scale: the distance between them, of 1 in the dimension of the group; 0 where all weights are 0.
        zero_point: in 0 … 15, whole numbers of the same shape and dtype.
    """

    scale: Tensor
    zero_point: Tensor

    @classmethod
    def of(cls, weight: Tensor, dim: int) -> "Grid":
        """``scale = (max - min) / 15``, ``zero_point = round(-min / scale)``; max and min of the weights and 0.

        Args:
            weight: float, finite.
            dim: the dimension along which weights share a group.
        """
        least = weight.amin(dim, keepdim=True).clamp(max=0)
        most = weight.amax(dim, keepdim=True).clamp(min=0)
        # A tensor as divisor: on CUDA torch multiplies by the reciprocal of a number, which rounds differently.
        scale = (most - least) / torch.full_like(most, _LEVELS)
        return cls(scale, torch.where(scale > 0, torch.round(-least / scale), 0))

    def nearest(self, weight: Tensor) -> Tensor:
        """The nearest of the values, ``round`` to even; weights as ``of`` took them, or a part."""
        q = (torch.round(weight / self.scale) + self.zero_point).clamp(0, _LEVELS)
        return torch.where(self.scale > 0, (q - self.zero_point) * self.scale, 0)


@dataclass(frozen=True)
class Int4(Treatment):
    """Weights to int4, rounded to nearest on an asymmetric min-max ``Grid`` per group of inputs of each row.

    Args:
        group: consecutive weights of a row that share a scale and a zero point; None: the whole row.

    Source: the round-to-nearest baseline of Frantar et al. 2022, "GPTQ", and its grid.
    """

    group: int | None = 128

    def __post_init__(self) -> None:
        """Refuses a group that is not a whole number of at least 1."""
        if self.group is None:
            return
        if isinstance(self.group, bool) or not isinstance(self.group, int) or self.group < 1:
            raise TreatmentError(
                f"{type(self).__name__}: group must be a whole number of at least 1, or None for the row, "
                f"not {self.group!r}"
            )

    @property
    def key(self) -> str:
        """``int4(128)``, ``int4(row)``."""
        return f"int4({self._group_name})"

    @property
    def _group_name(self) -> str:
        return "row" if self.group is None else str(self.group)

    def check_shape(self, n: int, k: int) -> None:
        """K must be a multiple of the group."""
        if self.group is not None and k % self.group:
            raise TreatmentError(f"{self.key} needs a K that is a multiple of {self.group}, and K = {k}")

    def compress(self, weight: Tensor, inputs: InputStatistics | None = None) -> Tensor:
        """``(q - zero_point) * scale``, computed in float32 and rounded to the weight's dtype.

        Raises:
            TreatmentError: K is no multiple of the group.
            ValueError: the weight holds a NaN or an infinity.
        """
        self.check_shape(*weight.shape)
        checks.finite("weight", weight)
        n, k = weight.shape
        groups = weight.detach().float().reshape(n, -1, self.group or k)
        return Grid.of(groups, dim=-1).nearest(groups).view(n, k).to(weight.dtype)

    def bits(self, n: int, k: int) -> int:
        """4 for each weight, and for each group 16 for its scale and 4 for its zero point.

        Scales are counted as checkpoints keep them, in 16 bits, and computed with in float32, as weights are that stay
        as they are: a scale in bfloat16 moves a weight no more than bfloat16 itself does.
        """
        return 4 * n * k + 20 * n * (k // (self.group or k))
