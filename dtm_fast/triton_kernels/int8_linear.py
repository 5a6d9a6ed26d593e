"""Linear layer with int8 weights and activations quantized on the fly, in Triton."""

import torch
import triton
import triton.language as tl

from dtm_fast.ops import native
from dtm_fast.triton_kernels.quantize_int8 import quantize_into
from dtm_fast.triton_kernels.tiles import tile_of
from dtm_fast.triton_kernels.tuning import Tuner, bucket, current_device_of, fits

CONFIGS = [
    triton.Config({"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 128}, num_warps=8, num_stages=3),
    triton.Config({"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 128}, num_warps=8, num_stages=3),
    triton.Config({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 128}, num_warps=4, num_stages=4),
    triton.Config({"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 256}, num_warps=4, num_stages=4),
    triton.Config({"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 256}, num_warps=4, num_stages=4),
]
# LLVM and ptxas would join the multiplication by the scales and the addition of the bias, which rounds once where the
# twin rounds twice. This keeps both from it: the text for ptxas then says mul.rn and add.rn, which it may not join.
UNFUSED = {"enable_fp_fusion": False}
_TUNER = Tuner()


@triton.jit
def int8_linear_kernel(
    qx,
    qx_stride,
    scales_x,
    qweight,
    qweight_stride,
    scales,
    bias,
    y,
    M,
    N,
    K,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A program computes one tile of y. Launch it with UNFUSED."""
    tile_m, tile_n = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), 8)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    left = qx + rows.to(tl.int64)[:, None] * qx_stride + depth[None, :]
    right = qweight + columns.to(tl.int64)[None, :] * qweight_stride + depth[:, None]

    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    for start in range(0, K, BLOCK_K):
        a = tl.load(left + start, (rows[:, None] < M) & (start + depth[None, :] < K), other=0)
        b = tl.load(right + start, (columns[None, :] < N) & (start + depth[:, None] < K), other=0)
        sums = tl.dot(a, b, sums, out_dtype=tl.int32)

    scale_x = tl.load(scales_x + rows, rows < M, other=0.0)
    scale = tl.load(scales + columns, columns < N, other=0.0)
    values = sums.to(tl.float32) * (scale_x[:, None] * scale[None, :])
    if HAS_BIAS:
        values = values + tl.load(bias + columns, columns < N, other=0.0).to(tl.float32)[None, :]
    outputs = y + rows.to(tl.int64)[:, None] * N + columns[None, :]
    tl.store(outputs, values.to(y.dtype.element_ty), (rows[:, None] < M) & (columns[None, :] < N))


def int8_linear(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    config: triton.Config | None = None,
) -> torch.Tensor:
    """x [..., K], qweight [N, K] int8, scale [N] float32, bias [N] or None -> [..., N] in the dtype of x.

    The bits are those of int8_linear_reference: sums are exact, and every step after them is rounded by itself.
    """
    x_rows, qweight, scale = native.as_rows(x), native.as_rows(qweight), scale.contiguous()
    bias = None if bias is None else bias.contiguous()
    (rows, depth), columns = x_rows.shape, qweight.shape[0]
    y = torch.empty((*x.shape[:-1], columns), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    # Rows that begin at multiples of 16 bytes, so that they are copied in pieces of 16.
    qx = torch.empty((rows, triton.cdiv(depth, 16) * 16), dtype=torch.int8, device=x.device)[:, :depth]
    scale_x = torch.empty((rows,), dtype=torch.float32, device=x.device)
    quantize_into(x_rows, qx, scale_x)

    def launch(chosen: triton.Config) -> None:
        block_m, block_n = chosen.kwargs["BLOCK_M"], chosen.kwargs["BLOCK_N"]
        grid = (triton.cdiv(rows, block_m) * triton.cdiv(columns, block_n),)
        int8_linear_kernel[grid](
            qx,
            qx.stride(0),
            scale_x,
            qweight,
            qweight.stride(0),
            scale,
            bias,
            y,
            rows,
            columns,
            depth,
            HAS_BIAS=bias is not None,
            **UNFUSED,
            **chosen.all_kwargs(),
        )

    with current_device_of(x):
        key = (x.device, x.dtype, bucket(rows), columns, depth)
        _TUNER.run(fits(CONFIGS, rows) if config is None else [config], key, launch)
    return y
