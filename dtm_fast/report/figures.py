"""The figures of what was measured: components alone, and growing joint configurations."""

from html import escape
from typing import Any

import plotly.graph_objects as go

from dtm_fast.measure import Measurement
from dtm_fast.report.content import Content, Curve, Sweep
from dtm_fast.report.layout import (
    HOVER,
    LINES,
    add_blank,
    add_diamond,
    colour_bar,
    curve_layout,
    finish_grid,
    on_grid,
)
from dtm_fast.report.setting import ListedComponent
from dtm_fast.report.wording import interval, measured_lines, measured_with, number


def heat_map(content: Content, sweep: Sweep) -> go.Figure:
    """Layer × component, coloured by mean FDT; a component not measured stays white, one not there grey."""
    setting = content.setting
    low, high = content.fdt_range
    found = [[sweep.measured.get(c.path) if c else None for c in row] for row in setting.grid]
    texts = [
        [_hover(content, c, sweep.measured.get(c.path)) if c else "" for c in row] for row in setting.grid
    ]
    waiting = [[c is not None and c.path not in sweep.measured for c in row] for row in setting.grid]
    figure = go.Figure()
    add_blank(figure, setting, waiting, texts)
    # Both ends are named: the upper one is the ceiling.
    ticks = [low + step * (high - low) / 4 for step in range(5)]
    figure.add_heatmap(
        z=[[m.summary("fdt").mean if m else None for m in row] for row in found],
        zmin=low,
        zmax=high,
        colorscale="Viridis",
        colorbar=colour_bar(
            "mean FDT, tokens (higher: less harm)", ticks, [number(round(tick, 1)) for tick in ticks]
        ),
        text=texts,
        hovertemplate=HOVER,
        **on_grid(setting),
    )
    finish_grid(figure, setting, above=60)
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
    figure.update_layout(**_layout(), showlegend=True)
    figure.update_yaxes(range=[0, content.setting.completion * 1.06])
    return figure


def sdt_curve(content: Content) -> go.Figure:
    """Mean SDT over the share of parameters converted."""
    figure = go.Figure()
    for curve, line in zip(content.curves, _colours(content.curves), strict=True):
        _add_line(figure, content, curve, "SDT", [p.sdt for p in curve.points], line, "solid")
    figure.update_layout(**_layout(), showlegend=len(content.curves) > 1)
    figure.update_yaxes(rangemode="tozero")
    return figure


def dppl_curve(content: Content) -> go.Figure:
    """Mean DPPL over the share of parameters converted."""
    figure = go.Figure()
    for curve, line in zip(content.curves, _colours(content.curves), strict=True):
        _add_line(figure, content, curve, "DPPL", [p.dppl for p in curve.points], line, "solid")
    figure.update_layout(**_layout(), showlegend=len(content.curves) > 1)
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
        hovertemplate=HOVER,
        mode="lines+markers",
        name=label,
        line={"color": colour, "dash": dash, "width": 2},
        marker={"size": 5},
    )
    if curve.chosen is not None:
        place = curve.points.index(curve.chosen)
        add_diamond(figure, 100 * curve.chosen.share, values[place], texts[place])


def _hover(content: Content, component: ListedComponent, measurement: Measurement | None) -> str:
    lines = [f"<b>{escape(component.path)}</b>"]
    if measurement is None:
        lines.append("not measured yet")
    else:
        if others := measured_with(component, measurement):
            lines.append(f"together with {escape(others)}")
        lines += measured_lines(content, measurement)
    return "<br>".join([*lines, f"{component.numel:,} parameters"])


def _colours(curves: list[Curve]) -> list[str]:
    return [LINES[place % len(LINES)] for place in range(len(curves))]


def _layout() -> dict[str, Any]:
    return curve_layout("share of parameters converted", ticksuffix="%", range=[0, 103])
