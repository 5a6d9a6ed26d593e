"""What counts as the same result, for every kind of contender."""

from collections.abc import Callable

import torch

Complaint = Callable[[torch.Tensor, torch.Tensor], str | None]


def bit_equal(result: torch.Tensor, expected: torch.Tensor) -> str | None:
    """For integer arithmetic with the twin's rounding."""
    if result.shape != expected.shape or result.dtype != expected.dtype:
        return f"{result.dtype} {list(result.shape)} instead of {expected.dtype} {list(expected.shape)}"
    different = int((result != expected).sum())
    return f"{different} of {expected.numel()} values differ from the twin's bits" if different else None


def relative_error(tolerance: float) -> Complaint:
    """For other arithmetic: ‖result − expected‖ ≤ tolerance × ‖expected‖, in float64, row by row at most 4 ×."""

    def complaint(result: torch.Tensor, expected: torch.Tensor) -> str | None:
        if result.shape != expected.shape:
            return f"shape {list(result.shape)} instead of {list(expected.shape)}"
        difference = result.double() - expected.double()
        error = float(difference.norm() / expected.double().norm())
        rows = difference.norm(dim=-1) / expected.double().norm(dim=-1).clamp_min(1e-30)
        worst = float(rows.max())
        if error <= tolerance and worst <= 4 * tolerance:  # a NaN fails both
            return None
        return f"relative error {error:.2g} (worst row {worst:.2g}), allowed {tolerance:.2g}"

    return complaint


def share_of_positions(tolerance: float) -> Complaint:
    """For booleans per position: near ties, and bfloat16 ties, may fall the other way in another summation."""

    def complaint(result: torch.Tensor, expected: torch.Tensor) -> str | None:
        if result.shape != expected.shape or result.dtype != torch.bool:
            return f"{result.dtype} {list(result.shape)} instead of bool {list(expected.shape)}"
        share = float((result != expected).double().mean())
        return None if share <= tolerance else f"{share:.2%} of positions differ, allowed {tolerance:.2%}"

    return complaint
