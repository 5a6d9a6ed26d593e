"""The tables of the page: what the figures show, as text."""

from html import escape

from dtm_fast.measure import EXTRA_METRICS, Measurement
from dtm_fast.report.content import Content, Sweep
from dtm_fast.report.wording import METRIC_NAMES, interval, markup, number


def sweep_table(content: Content, sweep: Sweep) -> str:
    """The measured components, the least harmful first."""
    extra = [
        name for name in EXTRA_METRICS if any(getattr(m, name) is not None for m in sweep.measured.values())
    ]
    heads = [
        "#",
        "component",
        "FDT_75",
        "mean FDT",
        "95% interval",
        "SDT",
        *(METRIC_NAMES[name] for name in extra),
    ]
    heads += ["ties", "parameters"]
    head = "".join(f'<th scope="col"{_left(column)}>{markup(name)}</th>' for column, name in enumerate(heads))
    rows = []
    for place, path in enumerate(sweep.ranked, start=1):
        cells = [str(place), path, *_row(content, sweep.measured[path], extra)]
        cells.append(f"{content.setting.components[path].numel:,}")
        rows.append(
            "<tr>"
            + "".join(f"<td{_left(column)}>{escape(cell)}</td>" for column, cell in enumerate(cells))
            + "</tr>"
        )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _row(content: Content, measurement: Measurement, extra: list[str]) -> list[str]:
    fdt = measurement.summary("fdt")
    return [
        number(fdt.p75),
        number(fdt.mean),
        interval(fdt.mean_interval),
        number(measurement.summary("sdt").mean),
        *(number(measurement.summary(n).mean) if getattr(measurement, n) is not None else "" for n in extra),
        str(int(measurement.ties(content.setting.floor.margin).sum())),
    ]


def _left(column: int) -> str:
    return ' class="left"' if column == 1 else ""


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
    head = "".join(f'<th scope="col">{markup(name)}</th>' for name in heads)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
