"""How many of a certificate's tokens new hidden states may have overtaken."""

import torch

from dtm_fast.ops import native
from dtm_fast.ops.rounding import ENLARGED, norm_above, norm_excess


def count_threats(
    hidden: torch.Tensor, base: torch.Tensor, radius: torch.Tensor, native_code: bool
) -> torch.Tensor:
    """`(~(norm_above(hidden - base)[:, None] < radius)).sum(1)`, the differences and their norm in float64.

    Args:
        hidden: [P, D], float32 or bfloat16.
        base: [P, D] in the same dtype.
        radius: [P, R] float32.
        native_code: whether the CPU kernel may run; it may differ from the twin in the last bit of a norm.

    Returns:
        int64 [P]; R where hidden is not finite.
    """
    return (
        _count_threats_cpu(hidden, base, radius)
        if native_code
        else count_threats_reference(hidden, base, radius)
    )


def count_threats_reference(hidden: torch.Tensor, base: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    """The reference twin."""
    return (~(norm_above(hidden.double() - base.double())[:, None] < radius)).sum(1)


def _count_threats_cpu(hidden: torch.Tensor, base: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    cpu, _, threads = native.cpu_call()
    hidden, base, radius = native.as_rows(hidden), base.contiguous(), radius.contiguous()
    positions, depth = hidden.shape
    threats = torch.empty(positions, dtype=torch.int64)
    cpu.certificate_threats(
        threads,
        native.FLOAT_TYPES[hidden.dtype],
        hidden.data_ptr(),
        hidden.stride(0),
        base.data_ptr(),
        radius.data_ptr(),
        positions,
        depth,
        radius.shape[1],
        ENLARGED,
        norm_excess(depth),
        threats.data_ptr(),
    )
    return threats
