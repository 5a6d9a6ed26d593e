"""What this machine can do at most, measured by native loops in the same process as the benchmarks."""

import functools
import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType

import torch  # before the module of loops: it brings the OpenMP runtime that both share

BUILD = Path(__file__).resolve().parent.parent / "build" / "bench"
NAMES = ("fp32_fma", "bf16_dot", "int8_vnni", "bf16_amx", "int8_amx")
FP32_IN_BF16 = "fp32_in_bf16_amx"
_PRODUCTS_IN_BF16 = 6  # of bfloat16, for one of float32 (csrc/kernels/cpu/float32_pieces.h)
# What could compute products of a type: the roof of a row is that of the best that the machine has, whichever our
# kernels use.
INSTRUCTIONS = {
    torch.int8: ("int8_vnni", "int8_amx"),
    torch.bfloat16: ("bf16_dot", "bf16_amx", "fp32_fma"),
    torch.float32: ("fp32_fma", FP32_IN_BF16),
}
UNITS = {name: "GOP/s" if name.startswith("int8") else "GFLOP/s" for name in (*NAMES, FP32_IN_BF16)}
UNITS["read"] = "GB/s"
_REGIONS = 8  # of each limit, each time
READ_BYTES = 2**30  # on top of any share of a last-level cache that a virtual machine really has


@dataclass
class Limits:
    """Best figures per second: arithmetic in units of 1e9 operations, `read` in 1e9 bytes."""

    threads: int
    best: dict[str, float] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)

    def roof(self, arithmetic: Sequence[str], operations: float, read_bytes: float) -> float | None:
        """The most operations per second (1e9) that the best of these instructions and memory allow together."""
        peaks = [self.best[name] for name in arithmetic if name in self.best]
        if not peaks or "read" not in self.best:
            return None
        return min(max(peaks), self.best["read"] * operations / max(read_bytes, 1.0))

    def as_json(self) -> dict[str, object]:
        return asdict(self) | {"units": {name: UNITS[name] for name in self.best}}


@functools.cache
def load() -> tuple[ModuleType | None, str]:
    """The module of loops, or None and why."""
    files = sorted(BUILD.glob("dtm_fast_bench_limits*.so"))
    if not files:
        return None, "dtm_fast_bench_limits is not built: make bench-limits"
    spec = importlib.util.spec_from_file_location("dtm_fast_bench_limits", files[-1])
    assert spec is not None
    assert spec.loader is not None
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        return None, f"{files[-1].name} cannot be loaded: {error}; make bench-limits"
    return module, "loaded"


def reading(memory: torch.Tensor) -> Callable[[], float]:
    """A call that reads a tensor's memory once with all threads, and does nothing else."""
    module, reason = load()
    if module is None:
        raise RuntimeError(reason)
    threads = torch.get_num_threads()
    return lambda: float(module.read(memory.data_ptr(), memory.nbytes, threads))


class Probe:
    """Measures the limits again and again, between the rows, and keeps the best of each.

    The best, not the median: a limit is what the machine can do, and the higher it is, the harder the goals. Each
    region is short, so that one falls between the time slices that other processes take.
    """

    def __init__(self, read_bytes: int = READ_BYTES, seconds: float = 0.004) -> None:
        self.limits = Limits(torch.get_num_threads())
        self._module, reason = load()
        self._buffer: torch.Tensor | None = None
        self._iterations: dict[str, int] = {}
        if self._module is None:
            self.limits.unavailable = dict.fromkeys((*NAMES, "read"), reason)
            return
        available = self._module.names()
        for name in NAMES:
            if not available[name]:
                self.limits.unavailable[name] = "this machine has no such instruction"
                continue
            calibration = 20_000
            self._module.peak(name, self.limits.threads, calibration)
            rates = [self._once(name, calibration) for _ in range(3)]
            ops = self._operations(name)
            self._iterations[name] = max(
                calibration, math.ceil(seconds * max(rates) / ops / self.limits.threads)
            )
        # Ordinary torch memory: the pages are of the kind that weights lie in.
        self._buffer = torch.randint(-(2**62), 2**62, (read_bytes // 8,), dtype=torch.int64)

    def again(self, times: int = 1) -> Limits:
        """Measure every limit `times` more, and return what is the best so far."""
        for name, value in self._values(times):
            self.limits.best[name] = max(self.limits.best.get(name, 0.0), value / 1e9)
        if "bf16_amx" in self.limits.best:
            self.limits.best[FP32_IN_BF16] = self.limits.best["bf16_amx"] / _PRODUCTS_IN_BF16
        return self.limits

    def _values(self, times: int) -> Iterator[tuple[str, float]]:
        if self._module is None or self._buffer is None:
            return
        part = self._buffer.nbytes // _REGIONS
        for region in range(times * _REGIONS):
            for name, iterations in self._iterations.items():
                yield name, self._once(name, iterations)
            # One part after the other, so that each has left the caches when its turn comes again.
            address = self._buffer.data_ptr() + region % _REGIONS * part
            yield "read", self._module.read(address, part, self.limits.threads)

    def _once(self, name: str, iterations: int) -> float:
        assert self._module is not None
        return float(self._module.peak(name, self.limits.threads, iterations))

    def _operations(self, name: str) -> int:
        assert self._module is not None
        return int(self._module.operations(name))
