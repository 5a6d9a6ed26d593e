"""Pruning by SparseGPT."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dtm_fast.compression.optimal_brain_surgeon import Settle, check_damp, compensated
from dtm_fast.compression.saliency import keep_in_rows
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
from dtm_fast.ops import checks


@dataclass(frozen=True)
class SparseGPT(Treatment):
    """Weights to zero, column after column, the later ones making up for each one's error.

    Where a block of columns begins, those of its weights go that cost least, w² / [H_F⁻¹]_jj, of all rows together and
    as the columns before have changed them; of a pattern N:M, of each row's M. All blocks take the same share, so that
    ``round(sparsity * N * K)`` go in all: first those of channels that are 0 in all inputs, and all of these even where
    they are more.

    The inputs are the base model's, so that a component's weight depends on nothing else that is compressed.
    SparseGPT's own script goes layer by layer, and takes the inputs that come out of the layers pruned before.

    Args:
        sparsity: share of the weights to drop, in [0, 1]; or ``"N:M"``, as of ``Prune``.
        damp: what is added to the diagonal of XᵀX, as a share of its mean.
        block: columns whose weights are compared with each other; of no effect on a pattern.

    Source: Frantar & Alistarh 2023, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot",
    section 3 and algorithm 1 (papers.md §3.1, §5).
    """

    is_slow = True

    sparsity: Sparsity
    damp: float = 0.01
    block: int = 128

    def __post_init__(self) -> None:
        """Refuses what is no sparsity, damp or block."""
        check_sparsity("SparseGPT", self.sparsity)
        check_damp("SparseGPT", self.damp)
        if isinstance(self.block, bool) or not isinstance(self.block, int) or self.block < 1:
            raise TreatmentError(f"SparseGPT: block must be a whole number of at least 1, not {self.block!r}")
        if pattern_of(self.sparsity) is not None and self.block != 128:
            raise TreatmentError(f"SparseGPT: a block has no effect on the pattern {self.sparsity}")

    @property
    def key(self) -> str:
        """``sparsegpt(0.5)``, ``sparsegpt(2:4)``; behind it ``damp=0.1`` and ``block=64`` where they are others."""
        damp = "" if self.damp == 0.01 else f",damp={float(self.damp)!r}"
        block = "" if self.block == 128 else f",block={self.block}"
        return f"sparsegpt({spelled(self.sparsity)}{damp}{block})"

    @property
    def needs_inputs(self) -> bool:
        """True."""
        return True

    def check_shape(self, n: int, k: int) -> None:
        """A pattern needs a K that is a multiple of M."""
        check_pattern_fits(self.sparsity, k)

    def compress(self, weight: Tensor, inputs: InputStatistics | None = None) -> Tensor:
        """The weight with zeros, and the rest of it changed to make up for them.

        Raises:
            TreatmentError: K does not fit the pattern, there are no inputs, or XᵀX has no Cholesky factor.
            ValueError: the weight holds a NaN or an infinity.
        """
        n, k = weight.shape
        self.check_shape(n, k)
        given = self.inputs_for(weight, inputs)
        checks.finite("weight", weight)
        pattern = pattern_of(self.sparsity)

        def decide(first: int, columns: Tensor, diagonal: Tensor) -> Settle:
            saliency = (columns.t() / diagonal).square()
            if pattern is not None:
                keep = keep_in_rows(saliency, pattern[1] - pattern[0])
            else:
                dropped = self._dropped(n, first + len(columns)) - self._dropped(n, first)
                keep = keep_in_rows(saliency.reshape(1, -1), dropped).view(saliency.shape)
            return lambda place, column: torch.where(keep[:, place], column, 0)

        return compensated(weight, given, self.damp, self.block if pattern is None else pattern[1], decide)

    def _dropped(self, n: int, columns: int) -> int:
        """How many of the weights of the first columns go."""
        return round(float(self.sparsity) * n * columns)

    def bits(self, n: int, k: int) -> int:
        """As of ``Prune``."""
        pattern = pattern_of(self.sparsity)
        kept = n * k - self._dropped(n, k) if pattern is None else n * k * pattern[0] // pattern[1]
        return pruned_bits(n, k, kept)
