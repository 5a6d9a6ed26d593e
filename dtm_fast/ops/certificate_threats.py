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
        native_code: whether the kernel of the device may run; it may differ from the twin in the last bit of a
            norm.

    Returns:
        int64 [P]; R where hidden is not finite.
    """
    if not native_code:
        return count_threats_reference(hidden, base, radius)
    if hidden.device.type == "cpu":
        return _count_threats_cpu(hidden, base, radius)
    threats = torch.empty(len(hidden), dtype=torch.int64, device=hidden.device)
    count_threats_cuda(threats, hidden, base, radius, ())
    return threats


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


def count_threats_cuda(
    threats: torch.Tensor,
    hidden: torch.Tensor,
    base: torch.Tensor,
    radius: torch.Tensor,
    marks: tuple[torch.Tensor, ...],
    vocabulary: int = 0,
) -> None:
    """The CUDA kernel: fills threats int64 [P] and, if given, the last two of the marks.

    Args:
        threats: the result of count_threats.
        hidden: as count_threats has it.
        base: likewise.
        radius: likewise.
        marks: (top, nearest, reference, mismatch, counts) or (), as ThreatMarks in certificate_threats.h has them.
        vocabulary: V of the ids in top, nearest and reference.
    """
    cuda, stream = native.cuda_call(hidden.device)
    hidden, base, radius = native.as_rows(hidden), base.contiguous(), radius.contiguous()
    positions, depth = hidden.shape
    top, nearest, reference, mismatch, counts = (each.data_ptr() for each in marks) if marks else (0,) * 5
    with native.on_device(hidden.device):
        cuda.certificate_threats(
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
            top,
            nearest,
            reference,
            vocabulary,
            mismatch,
            counts,
            marks[4].numel() if marks else 0,
            stream,
        )
