"""In which order to compress: the component that harms least first."""

from collections.abc import Callable, Mapping

from dtm_fast.measure import Measurement

# What ranks, and the metric that it needs beyond FDT and SDT, which are always there.
RANKINGS: dict[str, str | None] = {"fdt75": None, "dppl": "dppl", "perplexity": "perplexity"}


def _fdt75(measurement: Measurement) -> tuple[float, ...]:
    # FDT_75 is N for every component that harms few probes; their means tell those apart.
    fdt = measurement.summary("fdt")
    return (-fdt.p75, -fdt.mean, measurement.summary("sdt").mean)


def _mean_of(metric: str) -> Callable[[Measurement], tuple[float, ...]]:
    return lambda measurement: (measurement.summary(metric).mean,)


_KEYS: dict[str, Callable[[Measurement], tuple[float, ...]]] = {
    "fdt75": _fdt75,
    "dppl": _mean_of("dppl"),
    "perplexity": _mean_of("perplexity"),
}


def rank(measured: Mapping[str, Measurement], by: str = "fdt75") -> list[str]:
    """The components of ``measured``, the least harmful first; equals stand by name.

    Args:
        measured: component → the measurement of it alone under the treatment.
        by: ``"fdt75"`` (FDT_75, then mean FDT, then mean SDT), ``"dppl"`` or ``"perplexity"`` (mean over probes).

    Source: Deiseroth et al. 2023 (papers.md §1.7) for the three rankings compared.
    """
    key = _KEYS[by]
    return sorted(measured, key=lambda path: (key(measured[path]), path))
