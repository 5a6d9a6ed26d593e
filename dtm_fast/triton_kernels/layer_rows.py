"""The Triton kernels of ``device_rows``: each reads its rows once and writes them once."""

import torch
import triton  # type: ignore[import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, unused-ignore]
from torch import Tensor

from dtm_fast.triton_kernels.tuning import current_device_of


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As ``device_rows.rms_norm``."""
    x = x.contiguous()
    out = torch.empty_like(x)
    _norm(x, x.shape[-1], None, None, weight, out, eps)
    return out


def add_norm(x: Tensor, branch: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As ``device_rows.add_norm``."""
    branch = branch.contiguous()
    total, out = torch.empty_like(branch), torch.empty_like(branch)
    _norm(x.contiguous(), x.shape[-1], branch, total, weight, out, eps)
    return total, out


def change_norm(x: Tensor, change: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As ``device_rows.change_norm``."""
    x, change, width = x.contiguous(), change.contiguous(), x.shape[-1]
    out = torch.empty(x.shape, dtype=torch.bfloat16, device=x.device)
    if out.numel() == 0:
        return out
    block = triton.next_power_of_2(width)
    with current_device_of(x):
        _change_norm_kernel[(x.numel() // width,)](
            x, change, weight, out, width, eps, BLOCK=block, num_warps=min(16, max(1, block // 512))
        )
    return out


def change_gated(gate: Tensor, up: Tensor, d_gate: Tensor | None, d_up: Tensor | None) -> Tensor:
    """As ``device_rows.change_gated``."""
    rows, width = gate.shape
    if gate.stride() != up.stride() or gate.stride(1) != 1:
        gate, up = gate.contiguous(), up.contiguous()
    given = [each for each in (d_gate, d_up) if each is not None]
    if any(each.stride() != given[0].stride() or each.stride(1) != 1 for each in given):
        d_gate, d_up = (None if each is None else each.contiguous() for each in (d_gate, d_up))
        given = [each for each in (d_gate, d_up) if each is not None]
    out = torch.empty(gate.shape, dtype=torch.bfloat16, device=gate.device)
    if out.numel() == 0:
        return out
    block = min(2048, triton.next_power_of_2(width))
    with current_device_of(gate):
        _change_gated_kernel[(rows, triton.cdiv(width, block))](
            gate,
            up,
            given[0] if d_gate is None else d_gate,
            given[0] if d_up is None else d_up,
            out,
            gate.stride(0),
            given[0].stride(0),
            width,
            HAS_GATE=d_gate is not None,
            HAS_UP=d_up is not None,
            BLOCK=block,
            num_warps=8,
        )
    return out


def _norm(
    x: Tensor,
    width: int,
    branch: Tensor | None,
    total: Tensor | None,
    weight: Tensor,
    out: Tensor,
    eps: float,
) -> None:
    rows = x.numel() // width
    if rows == 0:
        return
    block = triton.next_power_of_2(width)
    with current_device_of(x):
        _norm_kernel[(rows,)](
            x,
            x if branch is None else branch,
            x if total is None else total,
            weight,
            out,
            width,
            eps,
            HAS_BRANCH=branch is not None,
            BLOCK=block,
            num_warps=min(16, max(1, block // 512)),
        )


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """As ``device_rows.rotate``."""
    rows, length, heads, width = x.shape
    if x.stride()[2:] != (width, 1):
        x = x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    with current_device_of(x):
        _rotate_kernel[(rows * length,)](
            x,
            cosine,
            sine,
            out,
            x.stride(0),
            x.stride(1),
            length,
            heads,
            HALF=width // 2,
            HALF_BLOCK=triton.next_power_of_2(width // 2),
            HEADS=triton.next_power_of_2(min(heads, 32)),
            num_warps=4,
            enable_fp_fusion=False,  # float32 products are rounded before they are added, too
        )
    return out


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """As ``device_rows.gated``."""
    width = gate.shape[-1]
    if gate.stride() != up.stride() or gate.flatten(0, -2).data_ptr() != gate.data_ptr():
        gate, up = gate.contiguous(), up.contiguous()
    gates, ups = gate.flatten(0, -2), up.flatten(0, -2)
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if out.numel() == 0:
        return out
    block = min(2048, triton.next_power_of_2(width))
    with current_device_of(gate):
        _gated_kernel[(gates.shape[0], triton.cdiv(width, block))](
            gates, ups, out, gates.stride(0), width, BLOCK=block, num_warps=8
        )
    return out


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _norm_kernel(x, branch, total, weight, out, width, eps, HAS_BRANCH: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def, unused-ignore]
    """One row a program; what is stored between transformers' operations is rounded here as well."""
    row = tl.program_id(0).to(tl.int64) * width
    column = tl.arange(0, BLOCK)
    inside = column < width
    value = tl.load(x + row + column, mask=inside, other=0.0)
    dtype = value.dtype
    if HAS_BRANCH:
        added = tl.load(branch + row + column, mask=inside, other=0.0)
        value = (value.to(tl.float32) + added.to(tl.float32)).to(dtype)
        tl.store(total + row + column, value, mask=inside)
    wide = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / width + eps)
    normed = (wide * scale).to(dtype).to(tl.float32)
    factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row + column, (factor * normed).to(dtype), mask=inside)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _rotate_kernel(  # type: ignore[no-untyped-def, unused-ignore]
    x,
    cosine,
    sine,
    out,
    row_stride,
    position_stride,
    length,
    heads,
    HALF: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
):
    """All heads of one position a program, the two halves of each together."""
    place = tl.program_id(0)
    position = place % length
    source = x + (place // length).to(tl.int64) * row_stride + position.to(tl.int64) * position_stride
    target = out + place.to(tl.int64) * heads * (2 * HALF)
    column = tl.arange(0, HALF_BLOCK)[None, :]
    whole = column < HALF
    angles = position * (2 * HALF) + column
    c0 = tl.load(cosine + angles, mask=whole, other=0.0).to(tl.float32)
    c1 = tl.load(cosine + angles + HALF, mask=whole, other=0.0).to(tl.float32)
    s0 = tl.load(sine + angles, mask=whole, other=0.0).to(tl.float32)
    s1 = tl.load(sine + angles + HALF, mask=whole, other=0.0).to(tl.float32)
    for begin in range(0, heads, HEADS):
        head = begin + tl.arange(0, HEADS)[:, None]
        inside = (head < heads) & whole
        offset = head * (2 * HALF) + column
        low = tl.load(source + offset, mask=inside, other=0.0)
        high = tl.load(source + offset + HALF, mask=inside, other=0.0)
        dtype = low.dtype
        low, high = low.to(tl.float32), high.to(tl.float32)
        first = (low * c0).to(dtype).to(tl.float32) - (high * s0).to(dtype).to(tl.float32)
        second = (high * c1).to(dtype).to(tl.float32) + (low * s1).to(dtype).to(tl.float32)
        tl.store(target + offset, first.to(dtype), mask=inside)
        tl.store(target + offset + HALF, second.to(dtype), mask=inside)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _gated_kernel(gate, up, out, stride, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def, unused-ignore]
    """A block of one row a program."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    opening = tl.load(gate + row * stride + column, mask=inside, other=0.0)
    dtype = opening.dtype
    wide = opening.to(tl.float32)
    opened = (wide / (1.0 + tl.exp(-wide))).to(dtype).to(tl.float32)
    value = opened * tl.load(up + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + column, value.to(dtype), mask=inside)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _change_norm_kernel(x, change, weight, out, width, eps, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def, unused-ignore]
    """One row a program."""
    row = tl.program_id(0).to(tl.int64) * width
    column = tl.arange(0, BLOCK)
    inside = column < width
    before = tl.load(x + row + column, mask=inside, other=0.0)
    after = before + tl.load(change + row + column, mask=inside, other=0.0)
    factor = tl.load(weight + column, mask=inside, other=0.0)
    normed = factor * (before * tl.rsqrt(tl.sum(before * before, 0) / width + eps))
    moved = factor * (after * tl.rsqrt(tl.sum(after * after, 0) / width + eps))
    tl.store(out + row + column, (moved - normed).to(tl.bfloat16), mask=inside)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _change_gated_kernel(  # type: ignore[no-untyped-def, unused-ignore]
    gate,
    up,
    d_gate,
    d_up,
    out,
    stride,
    d_stride,
    width,
    HAS_GATE: tl.constexpr,
    HAS_UP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A block of one row a program."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    g = tl.load(gate + row * stride + column, mask=inside, other=0.0)
    u = tl.load(up + row * stride + column, mask=inside, other=0.0)
    before = g / (1.0 + tl.exp(-g)) * u
    if HAS_GATE:
        g += tl.load(d_gate + row * d_stride + column, mask=inside, other=0.0)
    if HAS_UP:
        u += tl.load(d_up + row * d_stride + column, mask=inside, other=0.0)
    after = g / (1.0 + tl.exp(-g)) * u
    tl.store(out + row * width + column, (after - before).to(tl.bfloat16), mask=inside)
