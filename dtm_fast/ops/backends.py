"""Which implementation an operation uses, and why."""

import functools
import warnings

import torch

from dtm_fast.ops import native

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
    "token_divergence",
)
CUDA_OPERATIONS = ("unpack_mask",)


def choose(operation: str, backend: str | None, device: torch.device) -> str:
    """The backend to use: what the caller forces, or the best one for the device.

    Raise ValueError if `backend` is unknown, RuntimeError if it cannot run.
    """
    if backend is None:
        if device.type == "cpu" and native.cpu_isa() != "reference":
            return "cpu"  # as below, without the reason, which takes longer than a small product
        chosen, _ = default(operation, device.type)
        if chosen == "reference" and device.type == "cpu":
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
    """The backend that backend=None stands for on tensors of a device type, and the reason."""
    if device_type == "cpu":
        reason = native.why_no_cpu_kernels()
        if reason is None:
            return "cpu", f"native kernels, {native.cpu_isa()}"
        return "reference", reason
    if device_type == "cuda" and operation in CUDA_OPERATIONS:
        module, reason = native.load("_cuda")
        return ("reference", reason) if module is None else ("cuda", "native kernel")
    return "reference", f"no kernel for {device_type} tensors yet: torch operations on the device"


def _why_not(operation: str, backend: str, device_type: str) -> str | None:
    if backend == "reference":
        return None
    if backend == "triton" or (backend == "cuda" and operation not in CUDA_OPERATIONS):
        return "not implemented yet"
    if device_type != backend:
        return f"the tensors are on {device_type}"
    if backend == "cpu":
        return native.why_no_cpu_kernels()
    module, reason = native.load("_cuda")
    return reason if module is None else None


@functools.cache
def _warn_if_not_built() -> None:
    module, reason = native.load("_cpu")
    if module is None:
        warnings.warn(f"dtm_fast runs on its slow reference twins: {reason}", RuntimeWarning, stacklevel=4)
