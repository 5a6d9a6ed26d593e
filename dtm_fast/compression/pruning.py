"""Pruning: the least salient weights to zero."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dtm_fast.compression.saliency import OF_INPUTS, SALIENCIES, keep_in_rows, keep_mask
from dtm_fast.compression.sparsity import (
    Sparsity,
    check_pattern_fits,
    check_sparsity,
    pattern_of,
    pruned_bits,
    spelled,
)
from dtm_fast.compression.treatment import Treatment
from dtm_fast.errors import TreatmentError
from dtm_fast.model import InputStatistics

GROUPS = ("matrix", "row")
_USUAL_GROUP = {"magnitude": "matrix", "wanda": "row"}


@dataclass(frozen=True)
class Prune(Treatment):
    """The least salient weights to zero; of equally salient ones those that stand first.

    Args:
        sparsity: share of the weights to drop, in [0, 1]; or ``"N:M"``, to keep N of every M consecutive weights of a
            row, such as ``"2:4"``.
        saliency: what ranks the weights: ``"magnitude"``, |W_ij|; or ``"wanda"``, |W_ij| ‖X_j‖₂ with the base model's
            inputs X (Wanda's own script takes those that come out of the layers pruned before).
        group: what a share is of and within which weights are compared: ``"matrix"``, ``round(sparsity * N * K)`` of
            the whole; or ``"row"``, ``round(sparsity * K)`` of each output row. By default the matrix for magnitude,
            as Deiseroth et al., and the row for Wanda, as Sun et al. None where a pattern is given: there it is the M.

    Source: Deiseroth et al. 2023 (papers.md §1.5); Sun et al. 2023, "A Simple and Effective Pruning Approach for Large
    Language Models"; Mishra et al. 2021, "Accelerating Sparse Deep Neural Networks" (N:M).
    """

    sparsity: Sparsity
    saliency: str = "magnitude"
    group: str | None = None

    def __post_init__(self) -> None:
        """Refuses what is no sparsity, saliency or group; puts in the saliency's own group where none is given."""
        check_sparsity("Prune", self.sparsity)
        if self.saliency not in SALIENCIES:
            raise TreatmentError(f"Prune: saliency {self.saliency!r} is none of {', '.join(SALIENCIES)}")
        if self.group is None:
            if pattern_of(self.sparsity) is None:
                object.__setattr__(self, "group", _USUAL_GROUP[self.saliency])
        elif self.group not in GROUPS:
            raise TreatmentError(f"Prune: group {self.group!r} is none of {', '.join(GROUPS)}")
        elif pattern_of(self.sparsity) is not None:
            raise TreatmentError(f"Prune: the pattern {self.sparsity} takes no group, not even {self.group}")

    @property
    def key(self) -> str:
        """``prune(0.5)``, ``prune(2:4)``; behind it saliency and group where they are not the usual ones."""
        words = [spelled(self.sparsity)]
        if self.saliency != "magnitude":
            words.append(self.saliency)
        if self.group not in (None, _USUAL_GROUP[self.saliency]):
            words.append(str(self.group))
        return f"prune({','.join(words)})"

    @property
    def needs_inputs(self) -> bool:
        """Whether the saliency is of the inputs: Wanda's."""
        return self.saliency in OF_INPUTS

    def check_shape(self, n: int, k: int) -> None:
        """A pattern needs a K that is a multiple of M."""
        check_pattern_fits(self.sparsity, k)

    def compress(self, weight: Tensor, inputs: InputStatistics | None = None) -> Tensor:
        """``torch.where(mask, weight, 0)``."""
        self.check_shape(*weight.shape)
        given = (self.inputs_for(weight, inputs),) if self.needs_inputs else ()
        mask = self._mask(SALIENCIES[self.saliency](weight, *given))
        return torch.where(mask, weight, torch.zeros((), dtype=weight.dtype, device=weight.device))

    def _mask(self, saliency: Tensor) -> Tensor:
        """True where a weight is kept."""
        pattern = pattern_of(self.sparsity)
        if pattern is not None:
            kept, among = pattern
            return keep_in_rows(saliency.reshape(-1, among), among - kept).view(saliency.shape)
        if self.group == "row":
            return keep_in_rows(saliency, round(float(self.sparsity) * saliency.shape[1]))
        return keep_mask(saliency, float(self.sparsity))

    def bits(self, n: int, k: int) -> int:
        """A bit for each weight and 16 for each that is kept, or 16 for all where that is less."""
        pattern = pattern_of(self.sparsity)
        if pattern is not None:
            kept = n * k * pattern[0] // pattern[1]
        elif self.group == "row":
            kept = n * (k - round(float(self.sparsity) * k))
        else:
            kept = n * k - round(float(self.sparsity) * n * k)
        return pruned_bits(n, k, kept)


@dataclass(frozen=True)
class Drop(Treatment):
    """All weights to zero: the component multiplies by nothing. Its bias, where it has one, is still added."""

    @property
    def key(self) -> str:
        """``drop``."""
        return "drop"

    def compress(self, weight: Tensor, inputs: InputStatistics | None = None) -> Tensor:
        """``torch.zeros_like(weight)``."""
        return torch.zeros_like(weight)

    def bits(self, n: int, k: int) -> int:
        """None."""
        return 0
