"""Masks with one bit per weight: packing and unpacking."""

from typing import cast

import torch
import torch.nn.functional as F

from dtm_fast.ops import backends, checks, native
from dtm_fast.ops.library import is_recorded, register


def pack_mask(mask: torch.Tensor, *, backend: str | None = None) -> torch.Tensor:
    """Pack a boolean mask, eight entries to a byte, the lowest bit first.

    Equals `torch.from_numpy(numpy.packbits(mask.numpy(), axis=-1, bitorder="little"))`;
    the bits beyond K are 0.

    Args:
        mask: [..., N, K] bool.
        backend: None (the best), "cpu" or "reference".

    Returns:
        [..., N, ceil(K / 8)] uint8.

    Raises:
        TypeError: mask is no dense tensor of bool.
        ValueError: mask has no dimension; backend is unknown.
        RuntimeError: backend cannot run.
    """
    if is_recorded(mask):
        return cast(torch.Tensor, _PACK(mask, backend))
    return _run_pack(mask, backend)


def unpack_mask(
    packed: torch.Tensor,
    K: int,  # noqa: N803 (the name of the dimension everywhere)
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """Unpack a mask that pack_mask packed.

    Equals `torch.from_numpy(numpy.unpackbits(packed.numpy(), axis=-1, count=K, bitorder="little")).bool()`.

    Args:
        packed: [..., N, ceil(K / 8)] uint8; the bits beyond K must be 0.
        K: the number of columns.
        backend: None (the best), "cpu", "cuda", "triton" or "reference".

    Returns:
        [..., N, K] bool.

    Raises:
        TypeError: packed is no dense tensor of uint8.
        ValueError: packed does not have ceil(K / 8) columns, or bits set beyond K; backend is unknown.
        RuntimeError: backend cannot run.
    """
    if is_recorded(packed):
        return cast(torch.Tensor, _UNPACK(packed, K, backend))
    return _run_unpack(packed, K, backend)


def pack_mask_reference(mask: torch.Tensor) -> torch.Tensor:
    """The reference twin of pack_mask."""
    row_bytes = (mask.shape[-1] + 7) // 8
    padded = F.pad(mask, (0, row_bytes * 8 - mask.shape[-1]))
    bits = padded.reshape(*mask.shape[:-1], row_bytes, 8).to(torch.uint8)
    return (bits << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(-1, dtype=torch.uint8)


def unpack_mask_reference(packed: torch.Tensor, columns: int) -> torch.Tensor:
    """The reference twin of unpack_mask."""
    bits = (packed[..., None] >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1
    return bits.reshape(*packed.shape[:-1], packed.shape[-1] * 8)[..., :columns].bool()


def check_packed(name: str, packed: torch.Tensor, columns: int) -> None:
    """Raise unless packed can be a mask over rows of `columns` entries, as far as its shape and dtype say."""
    checks.count("K", columns)
    checks.tensor(name, packed, (torch.uint8,))
    checks.at_least_one_dim(name, packed)
    checks.size(name, packed, packed.dim() - 1, (columns + 7) // 8, f"ceil(K / 8) for K = {columns}")


def _pack_mask_cpu(mask: torch.Tensor) -> torch.Tensor:
    cpu, isa, threads = native.cpu_call()
    rows = native.as_rows(mask)
    packed = mask.new_empty((*mask.shape[:-1], (mask.shape[-1] + 7) // 8), dtype=torch.uint8)
    cpu.pack_mask(
        isa, threads, rows.data_ptr(), rows.stride(0), *rows.shape, packed.data_ptr(), packed.shape[-1]
    )
    return packed


def _unpack_mask_cpu(packed: torch.Tensor, columns: int) -> torch.Tensor:
    cpu, isa, threads = native.cpu_call()
    rows = native.as_rows(packed)
    mask = packed.new_empty((*packed.shape[:-1], columns), dtype=torch.bool)
    cpu.unpack_mask(
        isa, threads, rows.data_ptr(), rows.stride(0), rows.shape[0], columns, mask.data_ptr(), mask.shape[-1]
    )
    return mask


def _unpack_mask_cuda(packed: torch.Tensor, columns: int) -> torch.Tensor:
    cuda, stream = native.cuda_call(packed.device)
    rows = native.as_rows(packed).contiguous()
    mask = packed.new_empty((*packed.shape[:-1], columns), dtype=torch.bool)
    with native.on_device(packed.device):
        cuda.unpack_mask(rows.data_ptr(), rows.shape[0], columns, mask.data_ptr(), stream)
    return mask


def _unpack_mask_triton(packed: torch.Tensor, columns: int) -> torch.Tensor:
    from dtm_fast.triton_kernels.unpack_mask import unpack_mask as run

    return run(packed, columns)


_UNPACKERS = {
    "cpu": _unpack_mask_cpu,
    "cuda": _unpack_mask_cuda,
    "triton": _unpack_mask_triton,
    "reference": unpack_mask_reference,
}


def _check_mask(mask: torch.Tensor) -> None:
    checks.tensor("mask", mask, (torch.bool,))
    checks.at_least_one_dim("mask", mask)


def _run_pack(mask: torch.Tensor, backend: str | None = None) -> torch.Tensor:
    _check_mask(mask)
    chosen = backends.choose("pack_mask", backend, mask.device)
    return _pack_mask_cpu(mask) if chosen == "cpu" else pack_mask_reference(mask)


def _fake_pack(mask: torch.Tensor, backend: str | None = None) -> torch.Tensor:
    _check_mask(mask)
    return mask.new_empty((*mask.shape[:-1], (mask.shape[-1] + 7) // 8), dtype=torch.uint8)


def _run_unpack(packed: torch.Tensor, columns: int, backend: str | None = None) -> torch.Tensor:
    check_packed("packed", packed, columns)
    chosen = backends.choose("unpack_mask", backend, packed.device)
    checks.contents(checks.padding_bits_zero, "packed", packed, columns)
    return _UNPACKERS[chosen](packed, columns)


def _fake_unpack(packed: torch.Tensor, columns: int, backend: str | None = None) -> torch.Tensor:
    check_packed("packed", packed, columns)
    return packed.new_empty((*packed.shape[:-1], columns), dtype=torch.bool)


_PACK = register("pack_mask(Tensor mask, str? backend=None) -> Tensor", _run_pack, _fake_pack)
_UNPACK = register(
    "unpack_mask(Tensor packed, SymInt K, str? backend=None) -> Tensor", _run_unpack, _fake_unpack
)
