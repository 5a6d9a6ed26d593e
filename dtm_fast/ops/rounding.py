"""Bounds of rounding errors, whatever the order in which products are summed. Derived in certificate.py."""

import torch

_ROWS = 4096  # of a matrix, whose float64 copy is held at a time
_UNIT = 2.0**-24
_LEAST = 2.0**-126
_DENORMALS = 2.0**-100  # per element of a norm, for the denormals that are taken as zero
ENLARGED = 1 + 2.0**-16
"""What a bound is multiplied by for the few float32 operations that compute it."""
REDUCED = 1 - 2.0**-16
LARGEST_LOGIT = 2.0**120
"""While ‖h‖ ‖w_v‖ is below this, no partial sum overflows, and the bounds hold."""


def summation_error(depth: int) -> float:
    """γ for a dot product of `depth` terms, enlarged; infinite where there are too many to say anything."""
    relative = _roundings(depth) * _UNIT
    return relative / (1 - relative) * ENLARGED if relative < 0.5 else float("inf")


def underflow_error(depth: int) -> float:
    """ε for a dot product of `depth` terms."""
    return _roundings(depth) * _LEAST


def _roundings(depth: int) -> int:
    """n: how many roundings a product meets at most.

    64 is more than what float32 in pieces costs for few terms: on AMX, a product meets 16 fused multiply-adds, one
    addition of two halves and 24 of the six products of four steps, and what is left out of it is below 9 roundings
    (csrc/kernels/cpu/float32_pieces.h).
    """
    return max(depth + depth // 256 + 8, 64)


def tie_width(dtype: torch.dtype) -> float:
    """τ: logits that are further apart than this times the larger one do not round to the same `dtype`."""
    return 2.0**-7 * (1 + 2.0**-6) if dtype == torch.bfloat16 else 0.0


def norm_above(rows: torch.Tensor) -> torch.Tensor:
    """An upper bound of the Euclidean norm of each row [..., D] -> [...] float32."""
    norm: torch.Tensor = torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float64)
    return norm.float() * ENLARGED + norm_excess(rows.shape[-1])


def norms_above(matrix: torch.Tensor) -> torch.Tensor:
    """`norm_above` of [R, D] -> [R] float32, with few rows in float64 at a time."""
    return torch.cat([norm_above(rows) for rows in matrix.split(_ROWS)])


def norm_excess(depth: int) -> float:
    """What norm_above adds for `depth` elements."""
    return (depth + 1) * _DENORMALS
