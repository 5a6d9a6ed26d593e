"""Symmetric int8 quantization of rows, in Triton."""

import torch
import triton
import triton.language as tl

from dtm_fast.ops import native
from dtm_fast.triton_kernels.tuning import Tuner, bucket, current_device_of

CONFIGS = [
    triton.Config({"BLOCK_M": 1, "BLOCK_K": 2048}, num_warps=4),
    triton.Config({"BLOCK_M": 1, "BLOCK_K": 4096}, num_warps=8),
    triton.Config({"BLOCK_M": 1, "BLOCK_K": 1024}, num_warps=4),
    triton.Config({"BLOCK_M": 8, "BLOCK_K": 256}, num_warps=4),
]
_TUNER = Tuner()


@triton.jit
def quantize_int8_kernel(
    x, x_stride, M, K, q, q_stride, scales, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr
):
    """A program quantizes BLOCK_M rows: once over them for the scales, and again, from the cache, for the codes."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_K)
    inputs = x + rows.to(tl.int64)[:, None] * x_stride
    outputs = q + rows.to(tl.int64)[:, None] * q_stride

    # As whole numbers, the bits of magnitudes order as the magnitudes do, with infinity and then NaN above all.
    largest = tl.zeros([BLOCK_M], tl.int32)
    for start in range(0, K, BLOCK_K):
        inside = (rows[:, None] < M) & (start + columns[None, :] < K)
        values = tl.load(inputs + start + columns[None, :], inside, other=0.0).to(tl.float32)
        bits = values.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        largest = tl.maximum(largest, tl.max(bits, 1))
    # `/` may be approximate in compiled code; div_rn rounds as IEEE says, and keeps denormal numbers.
    scale = tl.div_rn(largest.to(tl.float32, bitcast=True), tl.full([BLOCK_M], 127.0, tl.float32))
    scale = tl.where(largest < 0x7F800000, scale, float("nan"))
    tl.store(scales + rows, scale, rows < M)

    for start in range(0, K, BLOCK_K):
        inside = (rows[:, None] < M) & (start + columns[None, :] < K)
        values = tl.load(inputs + start + columns[None, :], inside, other=0.0).to(tl.float32)
        codes = tl.div_rn(values, tl.broadcast_to(scale[:, None], values.shape))
        # Adding 1.5 * 2^23 leaves no place for a fraction, so the sum is rounded, half to even, to a whole number.
        codes = (codes + 12582912.0) - 12582912.0
        codes = tl.where(scale[:, None] > 0, codes, 0.0)
        codes = tl.minimum(tl.maximum(codes, -127.0), 127.0)
        tl.store(outputs + start + columns[None, :], codes.to(tl.int8), inside)


def quantize_into(
    x: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, config: triton.Config | None = None
) -> None:
    """Quantize x [M, K] into q [M, K] int8 and scale [M] float32; columns are contiguous, rows have any stride."""
    rows, depth = x.shape
    if rows == 0:
        return

    def launch(chosen: triton.Config) -> None:
        grid = (triton.cdiv(rows, chosen.kwargs["BLOCK_M"]),)
        quantize_int8_kernel[grid](x, x.stride(0), rows, depth, q, q.stride(0), scale, **chosen.all_kwargs())

    with current_device_of(x):
        _TUNER.run(CONFIGS if config is None else [config], (x.device, x.dtype, bucket(rows), depth), launch)


def quantize_rows(
    x: torch.Tensor, *, config: triton.Config | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., K], float32, bfloat16 or float16 -> q [..., K] int8 and scale [...] float32.

    The bits are those of quantize_rows_reference.
    """
    q = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    quantize_into(native.as_rows(x), native.as_rows(q), scale.reshape(-1), config)
    return q, scale
