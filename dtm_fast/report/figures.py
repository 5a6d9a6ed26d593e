"""The interactive figures of the page, by Plotly."""

from html import escape
from typing import Any

import plotly.graph_objects as go

from dtm_fast.measure import Measurement
from dtm_fast.report.content import Content, Curve, ListedComponent, Sweep
from dtm_fast.report.wording import interval, number

INK = "#1f2933"
GRID = "#e3e7ec"
ABSENT = "#d5dae0"
# Okabe-Ito colours, told apart by all common kinds of colour vision.
LINES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Liberation Sans', sans-serif"
_ROW_HEIGHT = 27


def heat_map(content: Content, sweep: Sweep) -> go.Figure:
    """Layer × component, coloured by mean FDT; a component not measured stays white, one not there grey."""
    setting = content.setting
    layers, names = setting.layers, setting.names
    at = {(c.name, c.layer): c for c in setting.components.values()}
    colour: list[list[float | None]] = []
    texts: list[list[str]] = []
    waiting: list[list[int | None]] = []
    for name in names:
        row = [at.get((name, layer)) for layer in layers]
        found = [sweep.measured.get(c.path) if c else None for c in row]
        colour.append([m.summary("fdt").mean if m else None for m in found])
        waiting.append([0 if c and not m else None for c, m in zip(row, found, strict=True)])
        texts.append([_hover(content, c, m) if c else "" for c, m in zip(row, found, strict=True)])
    low, high = content.fdt_range
    # Plotly reads a small HTML of its own in every text, so names from the model are escaped here too.
    common = {
        "x": layers,
        "y": [escape(name) for name in names],
        "text": texts,
        "hovertemplate": "%{text}<extra></extra>",
        "hoverongaps": False,
        "xgap": 2,
        "ygap": 2,
    }
    scale = go.Heatmap(
        z=colour,
        zmin=low,
        zmax=high,
        colorscale="Viridis",
        colorbar={
            "orientation": "h",
            "title": {"text": "mean FDT, tokens (higher: less harm)", "side": "top", "font": {"size": 12}},
            "x": 0,
            "xanchor": "left",
            "xref": "paper",
            "y": 1.0,
            "yanchor": "bottom",
            "len": 1,
            "thickness": 12,
            "ypad": 8,
            "xpad": 0,
            "outlinewidth": 0,
            # Both ends are named: the upper one is the ceiling.
            "tickvals": [low + step * (high - low) / 4 for step in range(5)],
            "ticktext": [number(round(low + step * (high - low) / 4, 1)) for step in range(5)],
        },
        **common,
    )
    blank = go.Heatmap(z=waiting, colorscale=[[0, "#ffffff"], [1, "#ffffff"]], showscale=False, **common)
    figure = go.Figure([blank, scale])
    figure.update_layout(
        **_layout(),
        height=_ROW_HEIGHT * len(names) + 104,
        margin={"l": 8, "r": 16, "t": 10, "b": 44},
        plot_bgcolor=ABSENT,
    )
    figure.update_xaxes(title="layer", showgrid=False, zeroline=False, ticks="", tickangle=0)
    figure.update_yaxes(type="category", autorange="reversed", dtick=1, showgrid=False, automargin=True)
    # The names stay off the cells.
    figure.update_yaxes(ticks="", ticklabelstandoff=6)
    return figure


def fdt_curve(content: Content) -> go.Figure:
    """FDT_75 and mean FDT, with its 95% interval, over the share of parameters converted."""
    figure = go.Figure()
    for curve, line in zip(content.curves, _colours(content.curves), strict=True):
        shares = [100 * point.share for point in curve.points]
        low, high = zip(*(point.fdt_interval for point in curve.points), strict=True)
        figure.add_scatter(
            x=shares + shares[::-1],
            y=[*high, *low[::-1]],
            fill="toself",
            fillcolor=line,
            opacity=0.14,
            line={"width": 0},
            hoverinfo="skip",
            showlegend=False,
        )
        ends = [interval(point.fdt_interval) for point in curve.points]
        _add_line(figure, content, curve, "mean FDT", [p.fdt for p in curve.points], line, "dot", ends)
        _add_line(figure, content, curve, "FDT<sub>75</sub>", [p.fdt75 for p in curve.points], line, "solid")
    figure.update_layout(**_curve_layout(), showlegend=True)
    figure.update_yaxes(range=[0, content.setting.completion * 1.06])
    return figure


def sdt_curve(content: Content) -> go.Figure:
    """Mean SDT over the share of parameters converted."""
    figure = go.Figure()
    for curve, line in zip(content.curves, _colours(content.curves), strict=True):
        _add_line(figure, content, curve, "SDT", [p.sdt for p in curve.points], line, "solid")
    figure.update_layout(**_curve_layout(), showlegend=len(content.curves) > 1)
    figure.update_yaxes(rangemode="tozero")
    return figure


def dppl_curve(content: Content) -> go.Figure:
    """Mean DPPL over the share of parameters converted."""
    figure = go.Figure()
    for curve, line in zip(content.curves, _colours(content.curves), strict=True):
        _add_line(figure, content, curve, "DPPL", [p.dppl for p in curve.points], line, "solid")
    figure.update_layout(**_curve_layout(), showlegend=len(content.curves) > 1)
    return figure


def _add_line(
    figure: go.Figure,
    content: Content,
    curve: Curve,
    name: str,
    values: list[Any],
    colour: str,
    dash: str,
    ends: list[str] | None = None,
) -> None:
    total = len(content.setting.components)
    label = escape(f"{curve.treatment}: ") + name if len(content.curves) > 1 else name
    texts = [
        f"{point.components} of {total} components<br>{point.share:.1%} of their parameters"
        f"<br>{name} {number(value) if value is not None else 'not measured'}"
        + (f"<br>95% interval {ends[place]}" if ends else "")
        for place, (point, value) in enumerate(zip(curve.points, values, strict=True))
    ]
    figure.add_scatter(
        x=[100 * point.share for point in curve.points],
        y=values,
        text=texts,
        hovertemplate="%{text}<extra></extra>",
        mode="lines+markers",
        name=label,
        line={"color": colour, "dash": dash, "width": 2},
        marker={"size": 5},
    )
    if curve.chosen is not None:
        place = curve.points.index(curve.chosen)
        figure.add_scatter(
            x=[100 * curve.chosen.share],
            y=[values[place]],
            text=[f"<b>the plan</b><br>{texts[place]}"],
            hovertemplate="%{text}<extra></extra>",
            mode="markers",
            name="the plan",
            showlegend=False,
            cliponaxis=False,
            marker={
                "size": 14,
                "symbol": "diamond",
                "color": "#ffffff",
                "line": {"color": INK, "width": 2.5},
            },
        )


def _hover(content: Content, component: ListedComponent, measurement: Measurement | None) -> str:
    lines = [f"<b>{escape(component.path)}</b>"]
    if measurement is None:
        lines.append("not measured yet")
    else:
        fdt = measurement.summary("fdt")
        ties = int(measurement.ties(content.setting.floor.margin).sum())
        lines += [
            f"FDT<sub>75</sub> {number(fdt.p75)} of {measurement.completion} tokens",
            f"mean FDT {number(fdt.mean)} (95% interval {interval(fdt.mean_interval)})",
            f"SDT {number(measurement.summary('sdt').mean)}",
        ]
        if measurement.dppl is not None:
            lines.append(f"DPPL {number(measurement.summary('dppl').mean)}")
        lines.append(f"ties inside the floor: {ties} of {len(measurement.fdt)} probes")
    lines.append(f"{component.numel:,} parameters")
    return "<br>".join(lines)


def _colours(curves: list[Curve]) -> list[str]:
    return [LINES[place % len(LINES)] for place in range(len(curves))]


def _layout() -> dict[str, Any]:
    return {
        # Plotly's default template is 7 KB in every figure.
        "template": "none",
        "autosize": True,
        "font": {"family": FONT, "size": 12, "color": INK},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "hoverlabel": {
            "align": "left",
            "bgcolor": "#ffffff",
            "bordercolor": INK,
            "font": {"family": FONT, "color": INK, "size": 12},
        },
        # A finger that scrolls the page must not draw a zoom box.
        "dragmode": False,
    }


def _curve_layout() -> dict[str, Any]:
    axis = {
        "gridcolor": GRID,
        "zeroline": False,
        "automargin": True,
        "linecolor": "#9aa5b1",
        "showline": True,
    }
    return {
        **_layout(),
        "height": 290,
        "margin": {"l": 8, "r": 14, "t": 34, "b": 44},
        "plot_bgcolor": "#ffffff",
        "xaxis": {**axis, "title": "share of parameters converted", "ticksuffix": "%", "range": [0, 103]},
        "yaxis": axis,
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
    }
