"""How much of a matrix is dropped: a share of its weights, or a pattern N:M."""

import re
from typing import TypeAlias

from dtm_fast.compression.treatment import KEPT_BITS
from dtm_fast.errors import TreatmentError

Sparsity: TypeAlias = float | str
"""A share in [0, 1], or ``"N:M"``: of every M consecutive weights of a row N are kept."""


def pattern_of(sparsity: Sparsity) -> tuple[int, int] | None:
    """(N, M) of a pattern, None for a share."""
    if not isinstance(sparsity, str):
        return None
    kept, among = sparsity.split(":")
    return int(kept), int(among)


def check_sparsity(name: str, sparsity: object) -> None:
    """Raises TreatmentError, in which ``name`` is the treatment's, unless ``sparsity`` is a share or a pattern."""
    if isinstance(sparsity, str) and (match := re.fullmatch(r"([1-9]\d*):([1-9]\d*)", sparsity)):
        if int(match[1]) >= int(match[2]):
            raise TreatmentError(f"{name}: {sparsity} drops nothing: N of N:M must be less than M")
        return
    if isinstance(sparsity, bool) or not isinstance(sparsity, (int, float)):
        raise TreatmentError(f"{name}: sparsity must be a number or a pattern like '2:4', not {sparsity!r}")
    if not 0 <= sparsity <= 1:
        raise TreatmentError(f"{name}: sparsity must lie in [0, 1], not {sparsity!r}")


def check_pattern_fits(sparsity: Sparsity, k: int) -> None:
    """Raises TreatmentError if rows of ``k`` weights cannot be cut into groups of M."""
    pattern = pattern_of(sparsity)
    if pattern is not None and k % pattern[1]:
        raise TreatmentError(f"the pattern {sparsity} needs rows of a multiple of {pattern[1]}, and K = {k}")


def spelled(sparsity: Sparsity) -> str:
    """As in a treatment's key: ``0.5`` or ``2:4``."""
    return sparsity if isinstance(sparsity, str) else repr(float(sparsity))


def pruned_bits(n: int, k: int, kept: int) -> int:
    """A bit for each weight and 16 for each that is kept, or 16 for all where that is less."""
    return min(n * k + KEPT_BITS * kept, KEPT_BITS * n * k)
