"""Times of GPU work by events around replays of a graph, so that neither Python nor launches are in the figures."""

import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch

_ROUNDS = 15


class Captured:
    """Calls that were captured one behind the other; what each gave stays, and a replay writes it anew."""

    def __init__(self, calls: list[Callable[[], Any]]) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # loads kernels, makes handles
                calls[0]()
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        self._count = len(calls)
        with torch.cuda.graph(self._graph):
            self.results = [call() for call in calls]

    def replay(self) -> float:
        """Seconds of one call, the mean of one replay."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        self._graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000 / self._count


def medians(captured: Mapping[str, Captured]) -> dict[str, dict[str, float]]:
    """Seconds of one call of each: median, fastest and slowest of rounds in which all take turns, in another order."""
    times: dict[str, list[float]] = {name: [] for name in captured}
    names = list(captured)
    for turn in range(_ROUNDS + 2):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            seconds = captured[name].replay()
            if turn >= 2:
                times[name].append(seconds)
    return {
        name: {"median_s": statistics.median(each), "min_s": min(each), "max_s": max(each)}
        for name, each in times.items()
    }
