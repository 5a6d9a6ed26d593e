"""The Optimal Brain Surgeon's recursion, column by column: what changing one costs, those that follow make up for."""

from collections.abc import Callable, Iterator
from typing import TypeAlias

import torch
from torch import Tensor

from dtm_fast.errors import TreatmentError
from dtm_fast.model import InputStatistics

_BLOCK = 128
"""Columns whose effect on all later ones is added up, to be applied in one product."""

Settle: TypeAlias = Callable[[int, Tensor], Tensor]
"""From a column's place within its period and its weights [N] to what they become."""


def check_damp(name: str, damp: object) -> None:
    """Raises TreatmentError, in which ``name`` is the treatment's, unless damp is a finite number of at least 0."""
    if isinstance(damp, bool) or not isinstance(damp, (int, float)) or not 0 <= damp < float("inf"):
        raise TreatmentError(f"{name}: damp must be a finite number of at least 0, not {damp!r}")


def compensated(
    weight: Tensor,
    inputs: InputStatistics,
    damp: float,
    period: int,
    decide: Callable[[int, Tensor, Tensor], Settle],
) -> Tensor:
    """Settles the columns of a weight from first to last, and lets those that follow make up for each one's error.

    With H = XᵀX + λ 1, X [tokens, K] the inputs, changing column j by -e costs least, ``(ΔW H ΔWᵀ).trace()``, if the
    columns F = j … K - 1 that are not settled yet change by ``-e [H_F⁻¹]_j / [H_F⁻¹]_jj``. All those rows are the
    rows of the upper triangular U with H⁻¹ = UᵀU: ``[H_F⁻¹]_j / [H_F⁻¹]_jj = U_j / U_jj`` and
    ``[H_F⁻¹]_jj = U_jj²``.

    λ is ``damp`` times the mean of the diagonal of XᵀX. Channels that are 0 in all inputs ("dead") count for nothing
    in that mean, and their weights become 0 before anything is settled.

    Everything is computed in float64, so that rounding, which depends on the number of threads, hardly ever decides
    what a weight becomes.

    Args:
        weight: float [N, K]; not changed.
        inputs: of K channels.
        damp: at least 0.
        period: columns that are decided on together, where they begin.
        decide: called with a period's first column, its weights [period, N] as they are by then (input channels first;
            the last period may be shorter) and its part of diag(U); gives what settles its columns.

    Returns:
        The settled weight, of the same shape and dtype.

    Raises:
        TreatmentError: H has no Cholesky factor.

    Source: Hassibi & Stork 1992; Frantar et al. 2022, "GPTQ", section 3.3; Frantar & Alistarh 2023, "SparseGPT",
    section 3.
    """
    columns = weight.detach().t().to(torch.float64, copy=True).contiguous()
    factor, dead = _inverse_factor(inputs, damp, weight.device)
    diagonal = factor.diagonal()
    columns[dead] = 0
    settle: Settle | None = None
    for start, end in _blocks(len(columns), period):
        errors = torch.empty_like(columns[start:end])
        for j in range(start, end):
            if j % period == 0:
                settle = decide(j, columns[j : j + period], diagonal[j : j + period])
            assert settle is not None
            settled = settle(j % period, columns[j])
            error = errors[j - start].copy_((columns[j] - settled) / diagonal[j])
            columns[j] = settled
            columns[j + 1 : end].addr_(factor[j, j + 1 : end], error, alpha=-1)
        columns[end:].addmm_(factor[start:end, end:].t(), errors, alpha=-1)
    return columns.t().to(weight.dtype).contiguous()


def _inverse_factor(inputs: InputStatistics, damp: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """U, float64 [K, K], and where channels are dead, bool [K]."""
    hessian = inputs.gram.to(device, torch.float64, copy=True)
    energy = hessian.diagonal()
    dead = energy == 0
    mean = energy.sum() / (~dead).sum() if bool((~dead).any()) else torch.ones_like(energy[0])
    energy += torch.where(dead, mean, damp * mean)
    # Of the matrix read backwards, the lower factor is the upper one of the matrix: H = R Rᵀ, so that U = R⁻¹.
    lower, failed = torch.linalg.cholesky_ex(hessian.flip(0, 1))
    if bool(failed):
        raise TreatmentError(
            f"XᵀX of its inputs over {inputs.count} tokens is not positive definite with damp = {damp}; "
            "a larger damp or more tokens make it so"
        )
    identity = torch.eye(len(hessian), dtype=torch.float64, device=device)
    return torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True), dead


def _blocks(columns: int, period: int) -> Iterator[tuple[int, int]]:
    """Ranges of columns, such that a period begins with a block or lies within it: what it looks at is up to date."""
    whole = max(1, _BLOCK // period) * period
    for first in range(0, columns, whole):
        end = min(first + whole, columns)
        yield from ((start, min(start + _BLOCK, end)) for start in range(first, end, _BLOCK))
