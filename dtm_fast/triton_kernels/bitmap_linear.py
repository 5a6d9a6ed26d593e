"""Linear layer over the kept entries of a weight, stored as a bitmap and the values of its ones, in Triton."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from dtm_fast.ops import native
from dtm_fast.triton_kernels.tuning import Tuner, current_device_of

if TYPE_CHECKING:
    from dtm_fast.ops.bitmap_weight import BitmapWeight

CONFIGS = [
    triton.Config({"TILES": 2}, num_warps=8, num_stages=2),
    triton.Config({"TILES": 1}, num_warps=4, num_stages=3),
    triton.Config({"TILES": 1}, num_warps=8, num_stages=3),
]
BLOCK_M = 16  # tokens, at most
_TUNER = Tuner()


@triton.jit
def bitmap_linear_kernel(
    x,
    x_stride,
    bits,
    begins,
    values,
    bias,
    y,
    M,
    N,
    K,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILES: tl.constexpr,
):
    """A program multiplies all tokens by a strip of 16 rows of the weight, TILES tiles of 128 columns at a time.

    bitmap_weight.py has the format, whose order is that of the fragments of mma.sync in CUDA: a tile stores its
    entries by product, lane and element, and here they are put into the order of rows and columns again.
    """
    strip = tl.program_id(0)
    rows = tl.arange(0, BLOCK_M)
    depth = tl.arange(0, TILES * 128)
    tile = tl.arange(0, TILES)
    # The 64 words of a tile, [lane, product // 4] there, as [product // 4, lane].
    word = tl.arange(0, 2)[:, None] + tl.arange(0, 32)[None, :] * 2
    place = tl.arange(0, 4)[:, None, None] + tl.arange(0, 8)[None, None, :] * 4
    back = tl.arange(0, 2)[None, None, :, None] == 1
    tiles = tl.cdiv(K, 128)
    first = strip.to(tl.int64) * tiles
    inputs = x + rows.to(tl.int64)[:, None] * x_stride + depth[None, :]

    sums = tl.zeros([BLOCK_M, 16], tl.float32)
    for start in range(0, tiles, TILES):
        inside = start + tile < tiles
        at = (first + start + tile)[:, None, None] * 64 + word[None, :, :]
        words = tl.load(bits + at, inside[:, None, None], other=0)
        begin = tl.load(begins + first + start + tile, inside, other=0)
        kept = tl.reshape((words[:, :, None, :, None] >> place[None, None, :, :, :]) & 1, [TILES, 2048])
        # Of each run, the values of four elements from its beginning, those of the other four from its end.
        counts = tl.sum(tl.reshape(kept, [TILES, 256, 8]), 2)
        sizes = counts + counts % 2
        ends = begin[:, None] + tl.cumsum(sizes, 1)
        fours = tl.reshape(kept, [TILES * 512, 4])
        before = tl.reshape(tl.cumsum(fours, 1) - fours, [TILES, 256, 2, 4])
        ends = ends[:, :, None, None]
        offsets = tl.where(back, ends - 1 - before, ends - sizes[:, :, None, None] + before)
        w = tl.load(values + tl.reshape(offsets, [TILES, 2048]), kept != 0, other=0.0)
        # Product (part, i), lane (g, t), element (q, half, b): row 8 half + g, column 32 part + 8 t + 4 i + 2 q + b.
        w = tl.permute(tl.reshape(w, [TILES, 4, 2, 8, 4, 2, 2, 2]), (0, 1, 4, 2, 5, 7, 6, 3))
        w = tl.reshape(w, [TILES * 128, 16])
        columns = start * 128 + depth
        a = tl.load(inputs + start * 128, (rows[:, None] < M) & (columns[None, :] < K), other=0.0)
        sums = tl.dot(a, w, sums)

    outputs = strip * 16 + tl.arange(0, 16)
    if HAS_BIAS:
        sums += tl.load(bias + outputs, outputs < N, other=0.0).to(tl.float32)[None, :]
    tl.store(
        y + rows[:, None] * N + outputs[None, :],
        sums.to(y.dtype.element_ty),
        (rows[:, None] < M) & (outputs[None, :] < N),
    )


def bitmap_linear(
    x: torch.Tensor,
    weight: BitmapWeight,
    bias: torch.Tensor | None,
    *,
    config: triton.Config | None = None,
) -> torch.Tensor:
    """x [..., K] bfloat16 of at most 16 rows, weight [N, K], bias [N] or None -> [..., N] bfloat16.

    Sums are in float32, in an order that K alone decides.
    """
    x_rows = native.as_rows(x)
    bias = None if bias is None else bias.contiguous()
    rows = x_rows.shape[0]
    y = torch.empty((*x.shape[:-1], weight.N), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    if rows > BLOCK_M:
        raise ValueError(f"x: expected at most {BLOCK_M} rows, got {rows}")

    def launch(chosen: triton.Config) -> None:
        bitmap_linear_kernel[(triton.cdiv(weight.N, 16),)](
            x_rows,
            x_rows.stride(0),
            weight.bits,
            weight.begins,
            weight.values,
            bias,
            y,
            rows,
            weight.N,
            weight.K,
            HAS_BIAS=bias is not None,
            BLOCK_M=BLOCK_M,
            **chosen.all_kwargs(),
        )

    with current_device_of(x):
        _TUNER.run(CONFIGS if config is None else [config], (x.device, weight.N, weight.K), launch)
    return y
