"""The native modules _cpu and _cuda, the instruction set in use, and how tensors are handed to them."""

import contextlib
import functools
import importlib
import importlib.util
import math
import os
from collections.abc import Iterator
from types import ModuleType

# torch before _cpu: it brings the OpenMP runtime (libgomp.so.1) that _cpu then shares.
import torch

from dtm_fast.errors import InputError

ISA_VARIABLE = "DTM_FAST_CPU_ISA"
ISAS = (
    "reference",
    "avx2",
    "avx512",
    "avx512_vnni",
    "avx512_bf16",
    "amx",
)  # index = the number that _cpu uses; each contains the former

# The numbers that _cpu and _cuda use for the types of activations and weights.
FLOAT_TYPES = {torch.float32: 0, torch.bfloat16: 1}

# Index = the number that _cuda uses (kernel_choice.h).
CUDA_KERNELS = ("best", "few_tokens", "mma", "hopper", "few_tokens_stream")

_isa_override: str | None = None


@functools.cache
def load(name: str) -> tuple[ModuleType | None, str]:
    """The extension module dtm_fast.<name>, or None, with one line on why."""
    try:
        return importlib.import_module(f"dtm_fast.{name}"), "loaded"
    except ModuleNotFoundError:
        option = "DTM_FAST_CUDA" if name == "_cuda" else "DTM_FAST_NATIVE"
        return None, (
            f"dtm_fast.{name} is not built: at installation the tools were missing or {option}=OFF was set; "
            f"install again with {option}=ON to build it or see what is missing"
        )
    except ImportError as error:
        return None, f"dtm_fast.{name} is built but cannot be loaded: {error}"


@functools.cache
def detected_cpu_isa() -> str | None:
    """The best instruction set here that the kernels know; None if there is none or _cpu is missing."""
    module, _ = load("_cpu")
    level = 0 if module is None else int(module.detected_isa())
    return ISAS[level] if level > 0 else None


def forced_cpu_isa() -> str | None:
    """What DTM_FAST_CPU_ISA (or use_cpu_isa) asks for. Raise InputError if this machine cannot run it."""
    return _possible(_isa_override or _of_the_environment())


@functools.cache
def _of_the_environment() -> str | None:
    """Read once, as oneDNN and others do: os.environ takes longer than a small product needs for its checks."""
    return os.environ.get(ISA_VARIABLE) or None


@functools.cache
def _possible(forced: str | None) -> str | None:
    if forced is not None:
        detected = detected_cpu_isa()
        possible = ISAS[: ISAS.index(detected) + 1] if detected is not None else ISAS[:1]
        if forced not in possible:
            module, reason = load("_cpu")
            why = "" if module is not None else f" ({reason})"
            raise InputError(f"{ISA_VARIABLE}={forced}: possible here: {', '.join(possible)}{why}")
    return forced


def cpu_isa() -> str:
    """The instruction set in use: the forced one, else the detected one, else "reference" (no kernels)."""
    return forced_cpu_isa() or detected_cpu_isa() or "reference"


def why_no_cpu_kernels() -> str | None:
    """Why the native CPU kernels cannot run, in one line, or None if they can."""
    isa = cpu_isa()
    if isa != "reference":
        return None
    module, reason = load("_cpu")
    if module is None:
        return reason
    if forced_cpu_isa() == "reference":
        return f"{ISA_VARIABLE}=reference is set"
    return "this CPU, or its operating system, has no AVX2 and FMA"


@contextlib.contextmanager
def use_cpu_isa(isa: str) -> Iterator[None]:
    """Within the context, as if DTM_FAST_CPU_ISA were `isa`, in all threads. For tests and benchmarks."""
    global _isa_override
    previous = _isa_override
    _isa_override = isa
    try:
        forced_cpu_isa()
        yield
    finally:
        _isa_override = previous


def cpu_call() -> tuple[ModuleType, int, int]:
    """What every CPU kernel call needs: the module, the instruction set's number, the number of threads."""
    module, reason = load("_cpu")
    if module is None:
        raise RuntimeError(reason)
    return module, ISAS.index(cpu_isa()), torch.get_num_threads()


@functools.cache
def why_no_triton() -> str | None:
    """Why the Triton kernels cannot run, in one line, or None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return None


def cuda_call(device: torch.device) -> tuple[ModuleType, int]:
    """What every CUDA kernel call needs: the module and the address of the device's current stream."""
    module, reason = load("_cuda")
    if module is None:
        raise RuntimeError(reason)
    return module, torch.cuda.current_stream(device).cuda_stream


def on_device(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Makes a GPU the current one, as launches need it; costs nothing if it is that already."""
    if device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """[..., K] as [rows, K] with contiguous columns and any row stride, as kernels read it."""
    if x.data_ptr() == 0 and x.numel() > 0:
        raise TypeError(f"expected tensors with data, got a {type(x).__name__} on {x.device} that has none")
    rows = x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return rows if rows.stride(-1) == 1 or rows.shape[-1] <= 1 else rows.contiguous()


def as_separate_rows(x: torch.Tensor) -> torch.Tensor:
    """As as_rows, of rows that do not overlap: the copy engine of a GPU takes no other strides."""
    rows = as_rows(x)
    return rows.contiguous() if rows.stride(0) < rows.shape[1] else rows


def address(x: torch.Tensor | None) -> int:
    """The address of a tensor's first element; 0 for None."""
    return 0 if x is None else x.data_ptr()
