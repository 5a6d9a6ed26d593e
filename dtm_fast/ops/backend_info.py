"""What runs where, and why: what `dtm-fast doctor` prints."""

import platform
from pathlib import Path
from typing import Any

import torch

from dtm_fast.ops import backends, native


def backend_info() -> dict[str, Any]:
    """Describe the machine, the native modules and the implementation that each operation will use.

    Returns a dict that json can write:
        cpu: name, isa_detected, isa_in_use, isa_forced (DTM_FAST_CPU_ISA or None), threads
        torch: version
        native_cpu, native_cuda: available (bool), reason
        cuda_device: available (bool), reason (its name, or why there is none)
        operations: for each operation and device type, backend (what backend=None stands for) and reason

    Raises:
        ValueError: DTM_FAST_CPU_ISA asks for what this machine cannot run.
    """
    cpu_module, cpu_reason = native.load("_cpu")
    cuda_module, cuda_reason = native.load("_cuda")
    return {
        "cpu": {
            "name": _cpu_name(),
            "isa_detected": native.detected_cpu_isa(),
            "isa_in_use": native.cpu_isa(),
            "isa_forced": native.forced_cpu_isa(),
            "threads": torch.get_num_threads(),
        },
        "torch": {"version": torch.__version__},
        "native_cpu": {"available": cpu_module is not None, "reason": cpu_reason},
        "native_cuda": {"available": cuda_module is not None, "reason": cuda_reason},
        "cuda_device": _cuda_device(),
        "operations": {
            operation: {
                device: dict(zip(("backend", "reason"), backends.default(operation, device), strict=True))
                for device in ("cpu", "cuda")
            }
            for operation in backends.OPERATIONS
        },
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _cuda_device() -> dict[str, Any]:
    if torch.version.cuda is None:
        return {"available": False, "reason": "this torch is built without CUDA"}
    if not torch.cuda.is_available():
        return {"available": False, "reason": "torch sees no CUDA device"}
    return {"available": True, "reason": torch.cuda.get_device_name()}
