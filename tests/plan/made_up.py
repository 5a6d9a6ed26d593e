"""Measurements and an evaluator that no model is needed for."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from types import SimpleNamespace

import torch

from dtm_fast import Int8, Measurement
from dtm_fast.compression import Configuration

N = 10


def measurement_of(
    fdt: Sequence[int], sdt: Sequence[int] | None = None, configuration: Configuration | None = None, **extra
) -> Measurement:
    """Made-up values per probe; ``extra`` are metrics."""
    values = torch.tensor(fdt)
    return Measurement(
        configuration=configuration or {},
        completion=N,
        fdt=values,
        sdt=N - values if sdt is None else torch.tensor(sdt),
        first_margin=torch.full((len(values),), 0.5).where(values < N, torch.nan),
        seconds=0.25,
        **{name: torch.tensor(value, dtype=torch.float64) for name, value in extra.items()},
    )


class MadeUpEvaluator:
    """FDT of a configuration is a known function of it, on every probe; it counts what it measures."""

    def __init__(
        self, fdt_of: Callable[[Configuration], int], sizes: dict[str, int], fails_at: int | None = None
    ) -> None:
        components = {path: SimpleNamespace(numel=size, shape=(1, size)) for path, size in sizes.items()}
        self.decoder = SimpleNamespace(
            calibration="", components=components, component=components.__getitem__
        )
        self.probes = SimpleNamespace(completion=N)
        self.fdt_of = fdt_of
        self.fails_at = fails_at
        self.measured: list[Configuration] = []

    def iterate(
        self, configurations: Iterable[Configuration], metrics: Sequence[str] = ("sdt",)
    ) -> Iterator[Measurement]:
        for configuration in configurations:
            if len(self.measured) == self.fails_at:
                raise KeyboardInterrupt
            self.measured.append(dict(configuration))
            value = self.fdt_of(configuration)
            extra = {metric: [1.0 + N - value] * 3 for metric in metrics if metric != "sdt"}
            yield measurement_of([value] * 3, configuration=configuration, **extra)


def int8(*paths: str) -> Configuration:
    return dict.fromkeys(paths, Int8())
