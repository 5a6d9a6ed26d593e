"""In which order to compress: the component that harms least first."""

from collections.abc import Callable, Mapping

from torch import Tensor

from dtm_fast.errors import InputError
from dtm_fast.measure import Measurement
from dtm_fast.measure.racing import standing

# What ranks, and the metric that it needs beyond FDT and SDT, which are always there.
RANKINGS: dict[str, str | None] = {"fdt75": None, "dppl": "dppl", "perplexity": "perplexity", "kl": "kl"}


def mean_of(measurement: Measurement, metric: str) -> float:
    """``measurement.summary(metric).mean``, without the intervals, which take a thousand times as long."""
    value: Tensor | None = getattr(measurement, metric)
    assert value is not None, f"{metric} was not measured"
    return float(value.double().numpy().mean())


def _fdt75(measurement: Measurement) -> tuple[float, ...]:
    # FDT_75 is N for every component that harms few probes; their means tell those apart.
    first, mean = standing(measurement.fdt)
    return (-first, -mean, mean_of(measurement, "sdt"))


def _mean_of(metric: str) -> Callable[[Measurement], tuple[float, ...]]:
    return lambda measurement: (mean_of(measurement, metric),)


_KEYS: dict[str, Callable[[Measurement], tuple[float, ...]]] = {
    "fdt75": _fdt75,
    "dppl": _mean_of("dppl"),
    "perplexity": _mean_of("perplexity"),
    "kl": _mean_of("kl"),
}


def rank(measured: Mapping[str, Measurement], by: str = "fdt75") -> list[str]:
    """The components of ``measured``, the least harmful first; equals stand by name.

    Args:
        measured: component → the measurement of it alone under the treatment.
        by: ``"fdt75"`` (FDT_75, then mean FDT, then mean SDT), ``"dppl"``, ``"perplexity"`` or ``"kl"`` (mean over
            probes).

    Raises:
        InputError: there is no such ranking.

    Source: Deiseroth et al. 2023 (papers.md §1.7) for the first three, which it compares.
    """
    if by not in _KEYS:
        raise InputError(f"no ranking {by!r}; known: {', '.join(_KEYS)}")
    key = _KEYS[by]
    return sorted(measured, key=lambda path: (key(measured[path]), path))
