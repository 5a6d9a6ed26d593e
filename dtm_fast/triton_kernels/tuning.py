"""Which of its committed configurations a kernel runs with: the fastest here, timed once per kind of shape."""

import contextlib
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

import torch
import triton
import triton.testing
from triton.runtime.errors import OutOfResources

from dtm_fast.ops import native

Launch = Callable[[triton.Config], object]


def bucket(rows: int) -> int:
    """What stands for a number of rows in the key of a choice: a power of two from 16 to 8192."""
    return int(min(max(triton.next_power_of_2(rows), 16), 8192))


def fits(configs: Sequence[triton.Config], rows: int, name: str = "BLOCK_M") -> list[triton.Config]:
    """The configurations whose blocks are not mostly empty for so many rows."""
    return [each for each in configs if each.kwargs[name] <= bucket(rows)]


def current_device_of(x: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device, whatever its arguments are on."""
    return native.on_device(x.device) if x.is_cuda else contextlib.nullcontext()


@dataclass
class Tuner:
    """Remembers the fastest configuration by key.

    triton.autotune would do, but it cannot key by a range of rows without an argument for it, and its timing
    breaks the capture of a CUDA graph. While one is captured, and in the interpreter, which nobody would time, the
    first configuration serves.
    """

    _fastest: dict[Hashable, triton.Config] = field(default_factory=dict)

    def run(self, configs: Sequence[triton.Config], key: Hashable, launch: Launch) -> None:
        """Launch with the fastest of the configurations; the first should be a fair choice everywhere."""
        config = configs[0] if len(configs) == 1 else self._fastest.get(key)
        if config is None and (triton.knobs.runtime.interpret or torch.cuda.is_current_stream_capturing()):
            config = configs[0]
        if config is None:
            config = self._fastest[key] = min(configs, key=lambda each: _milliseconds(launch, each))
        launch(config)


def _milliseconds(launch: Launch, config: triton.Config) -> float:
    try:
        return float(triton.testing.do_bench(lambda: launch(config), warmup=5, rep=20, return_mode="median"))
    except OutOfResources:  # more shared memory than this GPU has; what else fails is an error
        return float("inf")
