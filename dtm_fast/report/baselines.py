"""Criteria beside each other: what each one's choice does, over size."""

from html import escape

import plotly.graph_objects as go

from dtm_fast.plan.harms import PREDICTED
from dtm_fast.report.comparison import Comparison
from dtm_fast.report.content import Content
from dtm_fast.report.elements import folded, table, wide_figure
from dtm_fast.report.layout import DARK, HOVER, LINES, curve_layout
from dtm_fast.report.wording import interval, listed, markup, number

_OURS = "fdt"
_NAMES = {"fdt": "FDT", "sdt": "SDT", "dppl": "DPPL", "kl": "KL"}
_SYMBOLS = ("square", "triangle-up", "cross", "x", "triangle-down", "star", "hexagon")
_COLOURS = (*LINES[1:], "#5d3a8e", DARK)


def baselines_section(content: Content) -> str:
    """The section of a comparison; empty where there is none."""
    comparison = content.comparison
    if comparison is None:
        return ""
    n, probes = content.setting.completion, content.setting.probes
    note = (
        f"Within each size, every criterion chose by itself which components get {listed(comparison.treatments)}; the "
        f"figure shows what its choice does: mean FDT over {probes} probes, at most {n}."
    )
    if any(criterion in PREDICTED for criterion in comparison.chosen):
        note += " Dotted lines are of criteria that predict harm without measuring it."
    figure = wide_figure(
        _figure(content, comparison),
        "baselines",
        "Mean FDT over effective bits, a line for each criterion, in the table below",
        280,
    )
    inside = _table(comparison)
    return f"""<section>
<h2>What choosing by FDT buys</h2>
<p class="note">{markup(note)}</p>
{figure}{folded("All choices as a table", inside)}</section>
"""


def _figure(content: Content, comparison: Comparison) -> go.Figure:
    figure = go.Figure()
    others = [criterion for criterion in comparison.chosen if criterion != _OURS]
    for criterion in (*others, *([_OURS] if _OURS in comparison.chosen else [])):
        choices, ours = comparison.chosen[criterion], criterion == _OURS
        place = 0 if ours else others.index(criterion)
        summaries = [each.measurement.summary("fdt") for each in choices]
        figure.add_scatter(
            x=[each.bits for each in choices],
            y=[fdt.mean for fdt in summaries],
            text=[
                f"<b>chosen by {escape(_name(criterion))}</b><br>{number(each.bits)} effective bits "
                f"(budget {number(each.budget)})<br>mean FDT {number(fdt.mean)} "
                f"(95% interval {interval(fdt.mean_interval)})<br>FDT<sub>75</sub> {number(fdt.p75)}"
                for each, fdt in zip(choices, summaries, strict=True)
            ],
            hovertemplate=HOVER,
            mode="lines+markers",
            name=f"<b>{_name(criterion)}</b>" if ours else escape(_name(criterion)),
            line={
                "color": LINES[0] if ours else _COLOURS[place % len(_COLOURS)],
                "width": 4 if ours else 1.5,
                "dash": "dot" if criterion in PREDICTED else "solid",
            },
            marker={"size": 10, "symbol": "circle"}
            if ours
            else {"size": 7, "symbol": _SYMBOLS[place % len(_SYMBOLS)]},
            # Drawn last, on top of the others, but named first.
            legendrank=1 if ours else 1000 + place,
        )
    figure.update_layout(**curve_layout("effective bits of a weight"), showlegend=True)
    figure.update_layout(height=360)
    figure.update_yaxes(title="mean FDT, tokens", range=[0, content.setting.completion * 1.06])
    return figure


def _table(comparison: Comparison) -> str:
    heads = ("chosen by", "budget", "bits", "components", "FDT_75", "mean FDT", "95% interval", "SDT", "DPPL")
    rows = []
    for criterion, choices in comparison.chosen.items():
        for each in choices:
            m, fdt = each.measurement, each.measurement.summary("fdt")
            found = [number(each.budget), number(each.bits), str(len(m.configuration)), number(fdt.p75)]
            found += [number(fdt.mean), interval(fdt.mean_interval)]
            found += [
                number(m.summary(name).mean) if getattr(m, name) is not None else ""
                for name in ("sdt", "dppl")
            ]
            rows.append([_name(criterion), *found])
    return table(heads, rows, left=[0])


def _name(criterion: str) -> str:
    return _NAMES.get(criterion, criterion)
