"""Layers of the model's own weights as one launch each: for models whose layers end before they are launched."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dtm_fast.measure.device_layer import DeviceLayer

_MOST_SHAPES = (
    4  # numbers of rows for which graphs are kept: a sweep has one, a race one for each of its groups
)

Work = Callable[[], None]
Recorder = Callable[[Work], Work]
"""Hands back what does the same work on the same memory, on the current stream, whenever it is called."""

_Key = tuple[int, torch.Size, int, str]


class LayerGraphs:
    """Runs whole layers by what was recorded of them; the bits are those of the layers themselves.

    A recording reads and writes one place in memory, so a state is copied to it and from it. That is little beside the
    launches of some twenty kernels. The first run of every layer and shape is compared with the layer's own: where
    that differs, or nothing can be recorded, a warning says so and the layers are launched as before.

    Args:
        layers: all of the model.
        recorder: of what they run.
    """

    def __init__(self, layers: Sequence[DeviceLayer], recorder: Recorder) -> None:
        """Records nothing yet."""
        self._layers = layers
        self._recorder = recorder
        self._places: dict[torch.Size, Tensor] = {}
        self._replays: dict[_Key, Work] = {}
        self.why_not = ""
        """Why nothing is recorded any more."""

    def run(self, number: int, x: Tensor, skip: int) -> Tensor:
        """The state after layer ``number`` of the state before it; arguments as ``DeviceLayer.run``."""
        place = self._place_for(x)
        if place is None:
            return self._layers[number].run(x, {}, skip=skip)[0]
        # What a product rounds to is recorded with it.
        key = (number, x.shape, skip, torch.get_float32_matmul_precision())
        if key not in self._replays:
            return self._first(key, x, place)
        place.copy_(x)
        self._replays[key]()
        return place.clone()

    def _place_for(self, x: Tensor) -> Tensor | None:
        if self.why_not or (x.shape not in self._places and len(self._places) == _MOST_SHAPES):
            return None
        if x.shape not in self._places:
            self._places[x.shape] = torch.empty_like(x, memory_format=torch.contiguous_format)
        return self._places[x.shape]

    def _first(self, key: _Key, x: Tensor, place: Tensor) -> Tensor:
        number, _, skip, _ = key
        expected, _ = self._layers[number].run(x, {}, skip=skip)

        def work() -> None:
            self._layers[number].run(place, {}, skip=skip, out=place)

        place.copy_(x)
        try:
            replay = self._recorder(work)
        except RuntimeError as error:
            self._give_up(f"layer {number} cannot be recorded: {error}")
            return expected
        place.copy_(x)  # recording may have run it
        replay()
        if not torch.equal(_bits(place[:, skip:]), _bits(expected[:, skip:])):
            self._give_up(f"layer {number} gives other bits as a graph than kernel by kernel")
            return expected
        self._replays[key] = replay
        return expected

    def _give_up(self, why: str) -> None:
        self.why_not = why
        self._places.clear()
        self._replays.clear()
        warnings.warn(f"layers are launched kernel by kernel: {why}", stacklevel=4)


class CudaGraphs:
    """A ``Recorder``: what ran is a graph, launched at once; all graphs take their memory from one pool.

    Not by ``torch.cuda.graph``, which waits for the device and gives all unused memory back before each.

    Args:
        device: a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        """Takes no memory yet."""
        self._device = device
        self._pool: Any = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def __call__(self, work: Work) -> Work:
        """Runs ``work`` once, for what is made at a first run (workspaces, compiled kernels), and records it."""
        graph = torch.cuda.CUDAGraph()
        before = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(before)
        try:
            with torch.cuda.stream(self._stream):  # of its device
                work()
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    work()
                finally:
                    graph.capture_end()
        finally:  # what has run writes memory that others may be given next, also where the rest failed
            before.wait_stream(self._stream)

        def replay() -> None:
            with torch.cuda.device(self._device):
                graph.replay()

        return replay


def _bits(x: Tensor) -> Tensor:
    """Equal for equal bits, of what is no number too."""
    return x.contiguous().view(torch.int16 if x.element_size() == 2 else torch.int32)
