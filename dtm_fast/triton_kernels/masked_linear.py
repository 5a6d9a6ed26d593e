"""Linear layer with a bitmask over its weight, several masks of one weight in one launch, in Triton."""

import torch
import triton
import triton.language as tl

from dtm_fast.ops import native
from dtm_fast.triton_kernels.tiles import tile_of
from dtm_fast.triton_kernels.tuning import Tuner, bucket, current_device_of, fits

CONFIGS = {
    torch.bfloat16: [
        triton.Config({"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64}, num_warps=8, num_stages=3),
        triton.Config({"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 64}, num_warps=4, num_stages=3),
        triton.Config({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64}, num_warps=4, num_stages=4),
        triton.Config({"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 128}, num_warps=4, num_stages=4),
        triton.Config({"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 128}, num_warps=4, num_stages=4),
    ],
    # Fused multiply-adds on the ordinary units: tensor cores would round float32 to 10 bits.
    torch.float32: [
        triton.Config({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32}, num_warps=8, num_stages=3),
        triton.Config({"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 16}, num_warps=4, num_stages=3),
        triton.Config({"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 64}, num_warps=4, num_stages=3),
    ],
}
_TUNER = Tuner()


@triton.jit
def masked_linear_kernel(
    x,
    x_stride,
    weight,
    weight_stride,
    mask,
    mask_row_stride,
    mask_variant_stride,
    mask_bytes,
    bias,
    y,
    V,
    M,
    N,
    K,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A program computes one tile of y for one mask; the V programs of a tile are neighbours and share its loads."""
    program = tl.program_id(0)
    variant = (program % V).to(tl.int64)
    tile_m, tile_n = tile_of(program // V, tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), 8)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    row_bytes = tl.arange(0, BLOCK_K // 8)
    bit = tl.arange(0, 8).to(tl.uint8)
    left = x + rows.to(tl.int64)[:, None] * x_stride + depth[None, :]
    right = weight + columns.to(tl.int64)[:, None] * weight_stride + depth[None, :]
    masks = mask + variant * mask_variant_stride + columns.to(tl.int64)[:, None] * mask_row_stride
    masks += row_bytes[None, :]

    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    # In bytes of the mask, so that the compiler sees how its rows divide and copies them in words.
    for first in range(0, mask_bytes, BLOCK_K // 8):
        start = first * 8
        a = tl.load(left + start, (rows[:, None] < M) & (start + depth[None, :] < K), other=0.0)
        w = tl.load(right + start, (columns[:, None] < N) & (start + depth[None, :] < K), other=0.0)
        packed = tl.load(
            masks + first, (columns[:, None] < N) & (first + row_bytes[None, :] < mask_bytes), other=0
        )
        kept = tl.reshape((packed[:, :, None] >> bit[None, None, :]) & 1, [BLOCK_N, BLOCK_K]) != 0
        # A choice, no product: a weight that is masked out does not count, even if it is NaN.
        w = tl.where(kept, w, 0.0)
        sums = tl.dot(a, tl.trans(w), sums, input_precision="ieee")

    if HAS_BIAS:
        sums += tl.load(bias + columns, columns < N, other=0.0).to(tl.float32)[None, :]
    outputs = y + (variant * M + rows.to(tl.int64))[:, None] * N + columns[None, :]
    tl.store(outputs, sums.to(y.dtype.element_ty), (rows[:, None] < M) & (columns[None, :] < N))


def masked_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    mask: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    config: triton.Config | None = None,
) -> torch.Tensor:
    """x [..., K], weight [N, K], mask [N, ceil(K / 8)] or [V, N, ceil(K / 8)], bias [N] or None.

    Returns [..., N] or [V, ..., N] in the dtype of x. Sums are in float32, in the order of K, which neither the
    rows nor the masks beside change; tensor cores of another generation may add the products of a step otherwise.
    """
    x_rows, weight = native.as_rows(x), native.as_rows(weight)
    masks = mask if mask.dim() == 3 else mask[None]
    if masks.stride(-1) != 1:
        masks = masks.contiguous()
    bias = None if bias is None else bias.contiguous()
    (rows, depth), columns, variants = x_rows.shape, weight.shape[0], masks.shape[0]
    y = torch.empty((*mask.shape[:-2], *x.shape[:-1], columns), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y

    def launch(chosen: triton.Config) -> None:
        block_m, block_n = chosen.kwargs["BLOCK_M"], chosen.kwargs["BLOCK_N"]
        grid = (variants * triton.cdiv(rows, block_m) * triton.cdiv(columns, block_n),)
        masked_linear_kernel[grid](
            x_rows,
            x_rows.stride(0),
            weight,
            weight.stride(0),
            masks,
            masks.stride(1),
            masks.stride(0),
            masks.shape[2],
            bias,
            y,
            variants,
            rows,
            columns,
            depth,
            HAS_BIAS=bias is not None,
            **chosen.all_kwargs(),
        )

    with current_device_of(x):
        key = (x.device, x.dtype, variants, bucket(rows), columns, depth)
        _TUNER.run(fits(CONFIGS[x.dtype], rows) if config is None else [config], key, launch)
    return y
