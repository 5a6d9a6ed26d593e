"""How many of a certificate's tokens new hidden states may have overtaken, and which."""

from typing import NamedTuple

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
    cpu, isa, threads = native.cpu_call()
    hidden, base, radius = native.as_rows(hidden), base.contiguous(), radius.contiguous()
    positions, depth = hidden.shape
    threats = torch.empty(positions, dtype=torch.int64, device=hidden.device)
    cpu.certificate_threats(
        isa,
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


class Threatened(NamedTuple):
    """Positions, and the tokens that may win at any of them."""

    positions: torch.Tensor
    """int64 [R], ascending."""
    tokens: torch.Tensor
    """int64 [v], ascending."""
    own: torch.Tensor
    """int64 [R]: where the references are among the tokens."""


def select_threatened(
    threats: torch.Tensor,
    top: torch.Tensor,
    nearest: torch.Tensor,
    reference: torch.Tensor,
    bounds: tuple[int, int],
    vocabulary: int,
    native_code: bool,
) -> Threatened:
    """The positions with bounds[0] <= threats <= bounds[1], and the tokens that may win there or are wanted.

    Args:
        threats: int64 [P] of count_threats.
        top: int64 [P], the base's tokens.
        nearest: int64 [P, K], the tokens that threaten a position, in this order; K >= bounds[1].
        reference: int64 [P].
        bounds: of the threats.
        vocabulary: V, above all ids.
        native_code: whether the kernel may run, on the CPU; its result is that of its twin.

    Raises:
        IndexError: by the kernel, if a token is not below V.
    """
    if not native_code:
        return select_threatened_reference(threats, top, nearest, reference, bounds)
    cpu, _, _ = native.cpu_call()
    positions, own, tokens = (
        threats.new_empty(len(threats)),
        top.new_empty(len(top)),
        top.new_empty(vocabulary),
    )
    top, nearest, reference = top.contiguous(), nearest.contiguous(), reference.contiguous()
    count, found = cpu.select_threatened(
        threats.data_ptr(),
        top.data_ptr(),
        nearest.data_ptr(),
        reference.data_ptr(),
        *nearest.shape,
        vocabulary,
        *bounds,
        positions.data_ptr(),
        tokens.data_ptr(),
        own.data_ptr(),
    )
    return Threatened(positions[:count], tokens[:found], own[:count])


def select_threatened_reference(
    threats: torch.Tensor,
    top: torch.Tensor,
    nearest: torch.Tensor,
    reference: torch.Tensor,
    bounds: tuple[int, int],
) -> Threatened:
    """The reference twin."""
    positions = ((threats >= bounds[0]) & (threats <= bounds[1])).nonzero()[:, 0]
    own = reference[positions]
    threatening = torch.arange(nearest.shape[1], device=threats.device) < threats[positions, None]
    tokens = torch.cat([nearest[positions][threatening], top[positions], own]).unique()
    return Threatened(positions, tokens, torch.searchsorted(tokens, own))


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
