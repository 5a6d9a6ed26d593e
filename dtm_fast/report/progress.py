"""How a search went: rounds over mean sparsity, a beam over its depth, a joint search's front over size."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from dtm_fast.plan import Plan, Point
from dtm_fast.report.content import Content
from dtm_fast.report.elements import folded, small_figure, table
from dtm_fast.report.layout import DARK, DOT, FEW, HOVER, LINES, add_diamond, curve_layout, whole_ticks
from dtm_fast.report.searches import Beam, Joint, Rounds
from dtm_fast.report.wording import markup, number, percent

_METRICS = ("FDT_75", "mean FDT", "SDT", "DPPL")


@dataclass(frozen=True)
class _Way:
    """The curve of a plan, with what each point stands at.

    Attributes:
        xs: where each point stands.
        chosen: where the plan does.
        texts: what is said of each point beside its value.
        over: the name of the horizontal axis, and ``axis`` more of it.
        shape: of the lines between the points.
    """

    points: Sequence[Point]
    xs: Sequence[float]
    chosen: float
    texts: Sequence[str]
    over: str
    axis: dict[str, Any]
    shape: str = "linear"


def progress_section(content: Content) -> str:
    """The section of the plan's search; empty where there is none that has one."""
    plan, search, n = content.plan, content.search, content.setting.completion
    if plan is None or plan.chosen is None or not plan.curve:
        return ""
    if isinstance(search, Rounds):
        title, way = "Round by round", _of_rounds(content, plan, search)
        note = (
            "The model after each round; the diamond is the plan. The level is the least FDT_75 that the "
            "round expected of any component: each was measured beside the others as they were before it, so what "
            "all changes do together is worse."
        )
        if search.uniform:
            note += " Uniform: the same mean sparsity, every component alike."
        inside = _rounds_table(content, plan, search)
    elif isinstance(search, Beam):
        title, way = "Depth by depth", _of_beam(content, plan)
        note = "The best configuration of each depth; the diamond is the plan."
        inside = _beam_table(plan)
    elif isinstance(search, Joint):
        title, way = "What each size costs", _of_joint(content, plan)
        note = (
            "The line is the front: of what the search measured completely, nothing as small has a higher mean FDT. "
            "The small dots are all joint configurations that were measured, most of them on the way to better ones "
            "and for FDT alone; the diamond is the plan."
        )
        if search.confirmed_on is not None:
            note += (
                f" Line and diamond are of {search.confirmed_on} probes that the search had not seen, which decided "
                "between the best that it found; the dots are of the probes by which it searched, where the best are "
                "partly lucky."
            )
        inside = _joint_table(plan, search)
    else:
        return ""
    drawn = [("FDT", f"tokens before the first divergence, at most {n}", _fdt(content, plan, way))]
    if any(point.sdt is not None for point in way.points):
        drawn.append(("SDT", f"divergent tokens of {n}, mean", _other(content, plan, way, "sdt")))
    if any(point.dppl is not None for point in way.points):
        drawn.append(("DPPL", "perplexity of the base's text, mean", _other(content, plan, way, "dppl")))
    figures = "".join(
        small_figure(figure, f"progress-{name.lower()}", name, unit, f"{name} over {way.over}")
        for name, unit, figure in drawn
    )
    return f"""<section>
<h2>{title}</h2>
<p class="note">{markup(note)}</p>
<div class="curves">{figures}</div>
{folded("These points as a table", inside)}</section>
"""


def _of_rounds(content: Content, plan: Plan, search: Rounds) -> _Way:
    sparsities = search.mean_sparsities(content.setting)
    texts = [
        f"round {place} of {len(sparsities)}<br>mean sparsity {percent(sparsity)}"
        for place, sparsity in enumerate(sparsities, 1)
    ]
    xs = [100 * sparsity for sparsity in sparsities]
    return _Way(plan.curve, xs, xs[-1], texts, "mean sparsity", {"ticksuffix": "%", "range": [0, 103]})


def _of_beam(content: Content, plan: Plan) -> _Way:
    total = len(content.setting.components)
    texts = [
        f"depth {depth}<br>{point.components} of {total} components<br>{point.share:.1%} of their parameters"
        for depth, point in enumerate(plan.curve, 1)
    ]
    xs = list(range(1, len(plan.curve) + 1))
    axis = {"range": [0, len(xs) * 1.04], **whole_ticks(len(xs))}
    return _Way(plan.curve, xs, xs[-1], texts, "depth", axis)


def _of_joint(content: Content, plan: Plan) -> _Way:
    assert plan.chosen is not None
    total = len(content.setting.components)
    texts = [
        f"{number(point.bits)} effective bits<br>{point.components} of {total} components"
        for point in plan.curve
    ]
    # Between two of the front's points the best that is known is the smaller one's.
    return _Way(
        plan.curve,
        [p.bits for p in plan.curve],
        plan.chosen.bits,
        texts,
        "effective bits of a weight",
        {},
        "hv",
    )


def _fdt(content: Content, plan: Plan, way: _Way) -> go.Figure:
    figure = go.Figure()
    _add_dots(figure, content, "fdt", "mean FDT")
    chosen = plan.chosen
    assert chosen is not None
    if isinstance(content.search, Joint):
        _add_line(figure, way, "mean FDT", [p.fdt for p in way.points], label="the front")
    else:
        if isinstance(content.search, Rounds):
            _add_line(figure, way, "level", content.search.levels, colour=DARK, dash="dash")
        _add_line(figure, way, "mean FDT", [p.fdt for p in way.points], colour=LINES[1], dash="dot")
        _add_line(figure, way, "FDT<sub>75</sub>", [p.fdt75 for p in way.points])
        add_diamond(figure, way.chosen, chosen.fdt75, f"FDT<sub>75</sub> {number(chosen.fdt75)}")
    if isinstance(content.search, Rounds):
        _add_uniform(figure, way, content.search, "fdt", "mean FDT")
    add_diamond(figure, way.chosen, chosen.fdt, f"mean FDT {number(chosen.fdt)}")
    figure.update_layout(**curve_layout(way.over, **way.axis), showlegend=True)
    figure.update_yaxes(range=[0, content.setting.completion * 1.06])
    return figure


def _other(content: Content, plan: Plan, way: _Way, metric: str) -> go.Figure:
    """SDT or DPPL."""
    figure, name = go.Figure(), metric.upper()
    _add_dots(figure, content, metric, name)
    values = [getattr(point, metric) for point in way.points]
    _add_line(figure, way, name, values)
    beside = (
        _add_uniform(figure, way, content.search, metric, name) if isinstance(content.search, Rounds) else []
    )
    if plan.chosen is not None and (value := getattr(plan.chosen, metric)) is not None:
        add_diamond(figure, way.chosen, value, f"{name} {number(value)}")
    figure.update_layout(**curve_layout(way.over, **way.axis), showlegend=bool(beside))
    if metric == "sdt":
        figure.update_yaxes(rangemode="tozero")
        return figure
    known = [value for value in (*values, *beside, *(dot.dppl for dot in content.dots)) if value is not None]
    if max(known) > 10 * min(known):
        # A model that is pruned too far has a DPPL of any size.
        figure.update_yaxes(type="log", dtick=1, tickformat="~s")
    return figure


def _add_dots(figure: go.Figure, content: Content, metric: str, name: str) -> None:
    found = [(dot.bits, value) for dot in content.dots if (value := getattr(dot, metric)) is not None]
    if not found:
        return
    figure.add_scatter(
        x=[bits for bits, _ in found],
        y=[value for _, value in found],
        hovertemplate=f"%{{x:.4~g}} effective bits<br>{name} %{{y:.4~g}}<extra></extra>",
        mode="markers",
        name="all joint configurations",
        marker={"size": 4, "color": DOT},
    )


def _add_line(
    figure: go.Figure,
    way: _Way,
    name: str,
    values: Sequence[float | None],
    *,
    label: str | None = None,
    colour: str = LINES[0],
    dash: str = "solid",
) -> None:
    figure.add_scatter(
        x=list(way.xs),
        y=list(values),
        text=[
            f"{text}<br>{name} {'not measured' if value is None else number(value)}"
            for text, value in zip(way.texts, values, strict=True)
        ],
        hovertemplate=HOVER,
        mode="lines+markers" if len(values) <= FEW else "lines",
        name=label or name,
        line={"color": colour, "dash": dash, "width": 2, "shape": way.shape},
        marker={"size": 5},
    )


def _add_uniform(figure: go.Figure, way: _Way, search: Rounds, metric: str, name: str) -> list[float | None]:
    """A line of what uniform pruning does, and its values; none where it was not measured."""
    values = [getattr(point, metric) for point in search.uniform]
    if values:
        _add_line(figure, way, f"{name}, uniform", values, colour=LINES[2], dash="dot")
    return values


def _rounds_table(content: Content, plan: Plan, search: Rounds) -> str:
    heads = ["round", "added", "mean sparsity", "level", "bits", *_METRICS]
    heads += [f"uniform: {name}" for name in _METRICS] if search.uniform else []
    sparsities = search.mean_sparsities(content.setting)
    steps = zip(search.steps, sparsities, search.levels, plan.curve, strict=True)
    rows = [
        [str(place), percent(added), percent(mean), number(level), number(point.bits), *_metrics(point)]
        for place, (added, mean, level, point) in enumerate(steps, 1)
    ]
    for row, point in zip(rows, search.uniform, strict=False):
        row += _metrics(point)
    return table(heads, rows)


def _beam_table(plan: Plan) -> str:
    heads = ["depth", "components", "share", "bits", *_METRICS]
    rows = [
        [str(depth), str(point.components), f"{point.share:.1%}", number(point.bits), *_metrics(point)]
        for depth, point in enumerate(plan.curve, 1)
    ]
    return table(heads, rows)


def _joint_table(plan: Plan, search: Joint) -> str:
    """The front, and what each budget reached where that is not on it."""
    found: list[Point] = []
    for point in (*plan.curve, *search.reached):
        if point not in found:
            found.append(point)
    rows = []
    for point in sorted(found, key=lambda each: each.bits):
        budgets = [
            number(b) for b, reached in zip(search.budgets, search.reached, strict=True) if reached == point
        ]
        said = [f"best within {', '.join(budgets)}"] if budgets else []
        if point == plan.chosen:
            said.append("the plan")
        if point not in plan.curve:
            said.append("not on the front")
        share = f"{point.share:.1%}"
        rows.append([number(point.bits), str(point.components), share, *_metrics(point), "; ".join(said)])
    return table(["bits", "components", "share", *_METRICS, ""], rows)


def _metrics(point: Point) -> list[str]:
    return ["" if v is None else number(v) for v in (point.fdt75, point.fdt, point.sdt, point.dppl)]
