"""The tables of what was measured: what the heat maps and the curves show, as text."""

from dtm_fast.measure import EXTRA_METRICS, Measurement
from dtm_fast.report.content import Content, Sweep
from dtm_fast.report.elements import table
from dtm_fast.report.wording import METRIC_NAMES, interval, number, together


def sweep_table(content: Content, sweep: Sweep) -> str:
    """The measured components, the least harmful first."""
    extra = [
        name
        for name in ("sdt", *EXTRA_METRICS)
        if any(getattr(m, name) is not None for m in sweep.measured.values())
    ]
    heads = ["#", "component", "FDT_75", "mean FDT", "95% interval", *(METRIC_NAMES[name] for name in extra)]
    heads += ["ties", "parameters"]
    rows = []
    for place, path in enumerate(sweep.ranked, start=1):
        measurement = sweep.measured[path]
        paths = measurement.configuration
        weights = sum(content.setting.components[each].numel for each in paths)
        cells = _row(content, measurement, extra)
        rows.append([str(place), together(paths), *cells, f"{weights:,}"])
    return table(heads, rows, left=[1])


def _row(content: Content, measurement: Measurement, extra: list[str]) -> list[str]:
    fdt = measurement.summary("fdt")
    return [
        number(fdt.p75),
        number(fdt.mean),
        interval(fdt.mean_interval),
        *(number(measurement.summary(n).mean) if getattr(measurement, n) is not None else "" for n in extra),
        str(int(measurement.ties(content.setting.floor.margin).sum())),
    ]


def curve_table(content: Content) -> str:
    """The joint measurements, by treatment and size."""
    heads = ("treatment", "components", "share", "FDT_75", "mean FDT", "95% interval", "SDT", "DPPL", "")
    rows = [
        (
            curve.treatment,
            str(point.components),
            f"{point.share:.1%}",
            number(point.fdt75),
            number(point.fdt),
            interval(point.fdt_interval),
            number(point.sdt),
            number(point.dppl) if point.dppl is not None else "",
            "the plan" if point is curve.chosen else "",
        )
        for curve in content.curves
        for point in curve.points
    ]
    return table(heads, rows)
