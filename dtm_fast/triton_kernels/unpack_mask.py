"""Unpacking masks with one bit per weight, in Triton."""

import torch
import triton
import triton.language as tl

from dtm_fast.ops import native
from dtm_fast.triton_kernels.tuning import Tuner, bucket, current_device_of

CONFIGS = [
    triton.Config({"BLOCK_N": 4, "BLOCK_BYTES": 128}, num_warps=4),
    triton.Config({"BLOCK_N": 1, "BLOCK_BYTES": 512}, num_warps=4),
    triton.Config({"BLOCK_N": 64, "BLOCK_BYTES": 8}, num_warps=4),
]
_TUNER = Tuner()


@triton.jit
def unpack_mask_kernel(
    packed, packed_stride, packed_bytes, mask, N, K, BLOCK_N: tl.constexpr, BLOCK_BYTES: tl.constexpr
):
    """A program unpacks BLOCK_BYTES bytes of each of BLOCK_N rows."""
    across = tl.cdiv(packed_bytes, BLOCK_BYTES)
    rows = tl.program_id(0) // across * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.program_id(0) % across * BLOCK_BYTES
    row_bytes = first + tl.arange(0, BLOCK_BYTES)
    columns = first * 8 + tl.arange(0, BLOCK_BYTES * 8)
    inside = (rows[:, None] < N) & (row_bytes[None, :] < packed_bytes)
    rows = rows.to(tl.int64)
    values = tl.load(packed + rows[:, None] * packed_stride + row_bytes[None, :], inside, other=0)
    bits = (values[:, :, None] >> tl.arange(0, 8).to(tl.uint8)[None, None, :]) & 1
    bits = tl.reshape(bits, [BLOCK_N, BLOCK_BYTES * 8])
    tl.store(mask + rows[:, None] * K + columns[None, :], bits, (rows[:, None] < N) & (columns[None, :] < K))


def unpack_mask(packed: torch.Tensor, columns: int, *, config: triton.Config | None = None) -> torch.Tensor:
    """packed [..., ceil(K / 8)] uint8 -> [..., K] bool, for K = columns."""
    packed_rows = native.as_rows(packed)
    rows = packed_rows.shape[0]
    mask = torch.empty((*packed.shape[:-1], columns), dtype=torch.bool, device=packed.device)
    if mask.numel() == 0:
        return mask

    def launch(chosen: triton.Config) -> None:
        across = triton.cdiv(packed_rows.shape[1], chosen.kwargs["BLOCK_BYTES"])
        unpack_mask_kernel[(triton.cdiv(rows, chosen.kwargs["BLOCK_N"]) * across,)](
            packed_rows,
            packed_rows.stride(0),
            packed_rows.shape[1],
            mask.view(torch.uint8),
            rows,
            columns,
            **chosen.all_kwargs(),
        )

    with current_device_of(packed):
        _TUNER.run(CONFIGS if config is None else [config], (packed.device, bucket(rows), columns), launch)
    return mask
