"""Which implementation an operation uses, and why."""

import functools
import warnings

import torch

from dtm_fast.ops import gpu_choices, native

BACKENDS = ("cpu", "cuda", "triton", "reference")
OPERATIONS = (
    "quantize_int8",
    "int8_linear",
    "pack_mask",
    "unpack_mask",
    "apply_mask",
    "masked_linear",
    "pack_sparse",
    "sparse_linear",
    "bitmap_linear",
    "token_divergence",
)
CPU_OPERATIONS = tuple(each for each in OPERATIONS if each != "bitmap_linear")
CUDA_OPERATIONS = (
    "quantize_int8",
    "int8_linear",
    "unpack_mask",
    "masked_linear",
    "bitmap_linear",
    "token_divergence",
)
TRITON_OPERATIONS = CUDA_OPERATIONS


def choose(
    operation: str,
    backend: str | None,
    device: torch.device,
    dtype: torch.dtype | None = None,
    tokens: int | None = None,
) -> str:
    """The backend to use: what the caller forces, or the best one for the device.

    Args:
        operation: one of OPERATIONS.
        backend: one of BACKENDS, or None.
        device: of the tensors.
        dtype: of the activations, on which the choice on a GPU may depend.
        tokens: rows of activations, likewise.

    Raises:
        ValueError: `backend` is unknown.
        RuntimeError: it cannot run.
    """
    if backend is None:
        if device.type == "cpu" and operation in CPU_OPERATIONS and native.cpu_isa() != "reference":
            return "cpu"  # as below, without the reason, which takes longer than a small product
        if device.type == "cuda":
            return _on_gpu(operation, device.index or 0, dtype, tokens)[0]
        chosen, _ = default(operation, device.type)
        if chosen == "reference" and device.type == "cpu" and operation in CPU_OPERATIONS:
            _warn_if_not_built()
        return chosen
    if backend not in BACKENDS:
        expected = ", ".join(repr(each) for each in BACKENDS)
        raise ValueError(f"backend: expected None, {expected}, got {backend!r}")
    reason = _why_not(operation, backend, device.type)
    if reason is not None:
        raise RuntimeError(f"{operation}: backend {backend!r} cannot run: {reason}")
    return backend


def default(operation: str, device_type: str) -> tuple[str, str]:
    """The backend that backend=None stands for on tensors of a device type, and the reason.

    On a GPU that of many bfloat16 tokens; the reason says where the choice is another.
    """
    if device_type == "cpu":
        if operation not in CPU_OPERATIONS:
            return "reference", "no kernel for cpu tensors: sparse_linear is made for them"
        reason = native.why_no_cpu_kernels()
        if reason is None:
            return "cpu", f"native kernels, {native.cpu_isa()}"
        return "reference", reason
    if device_type == "cuda" and operation in CUDA_OPERATIONS:
        return _on_gpu(operation, 0, None, None)
    return "reference", f"no kernel for {device_type} tensors: torch operations on the device"


@functools.lru_cache(maxsize=1024)  # every number of tokens is a key
def _on_gpu(operation: str, device: int, dtype: torch.dtype | None, tokens: int | None) -> tuple[str, str]:
    """The first backend of the measured ranking that can run, and the reason."""
    if operation not in CUDA_OPERATIONS:
        return "reference", "no kernel for cuda tensors: torch operations on the device"
    ranking, why = gpu_choices.ranking(operation, device, dtype, tokens)
    obstacles: list[str] = []
    for backend in ranking:
        reason = _why_not(operation, backend, "cuda")
        if reason is None:
            return backend, "; ".join([why, *obstacles])
        obstacles.append(f"not {backend}: {reason}")
    return "reference", "; ".join([why, *obstacles])


def _why_not(operation: str, backend: str, device_type: str) -> str | None:
    if backend == "reference":
        return None
    operations = {"cpu": CPU_OPERATIONS, "cuda": CUDA_OPERATIONS, "triton": TRITON_OPERATIONS}[backend]
    if operation not in operations:
        return "not implemented"
    if device_type != ("cpu" if backend == "cpu" else "cuda"):
        return f"the tensors are on {device_type}"
    if backend == "cpu":
        return native.why_no_cpu_kernels()
    if backend == "triton":
        return native.why_no_triton()
    module, reason = native.load("_cuda")
    return reason if module is None else None


@functools.cache
def _warn_if_not_built() -> None:
    module, reason = native.load("_cpu")
    if module is None:
        warnings.warn(f"dtm_fast runs on its slow reference twins: {reason}", RuntimeWarning, stacklevel=4)
