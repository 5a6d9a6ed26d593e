"""The plan's map: what is done to each component, by layer."""

from collections import Counter
from html import escape
from string import ascii_uppercase

import plotly.graph_objects as go

from dtm_fast.compression import Prune, SparseGPT, Treatment
from dtm_fast.compression.sparsity import pattern_of
from dtm_fast.plan import Plan
from dtm_fast.report.content import Content
from dtm_fast.report.elements import folded, table, wide_figure
from dtm_fast.report.layout import add_blank, colour_bar, finish_grid, on_grid
from dtm_fast.report.searches import Rounds
from dtm_fast.report.setting import ListedComponent
from dtm_fast.report.wording import counted, interval, markup, measured_lines, measured_with, number, percent

# Okabe-Ito from light to dark, and two darker ones; with the colour of what is written on each.
_COLOURS = (
    ("#56b4e9", "#000000"),
    ("#e69f00", "#000000"),
    ("#cc79a7", "#000000"),
    ("#009e73", "#ffffff"),
    ("#d55e00", "#ffffff"),
    ("#0072b2", "#ffffff"),
    ("#5d3a8e", "#ffffff"),
    ("#1f2933", "#ffffff"),
)
# Pixels that a layer needs: for a number in each cell, which is left out where the map would be wider than a screen;
# for a letter; and for a colour alone.
_NUMBER, _LETTER, _COLOUR = 22, 12, 6
_NUMBERED_LAYERS = 40


def map_section(content: Content) -> str:
    """The section with the map, its legend and a table; empty where no plan treats anything."""
    plan, setting = content.plan, content.setting
    if plan is None or not plan.configuration:
        return ""
    kept = len(setting.components) - len(plan.configuration)
    if _is_pruning(plan):
        note, figure = (
            "The share of each component's weights that is dropped, in percent",
            _sparsity_map(content, plan),
        )
        keys = [_swatch("#ffffff", "", f"kept whole: {kept}")] if kept else []
        room = _NUMBER if len(setting.layers) <= _NUMBERED_LAYERS else _COLOUR
    else:
        note, figure = "What is done to each component, by layer", _treatment_map(content, plan)
        keys = _legend(content, plan)
        room = _LETTER if len(_treatments(content, plan)) > 1 else _COLOUR
    if len(setting.components) < len(setting.names) * len(setting.layers):
        keys.append('<span class="key"><span class="swatch absent"></span> no such component</span>')
    legend = f'<p class="keys">{" ".join(keys)}</p>\n' if keys else ""
    described = "Map of the plan: what is done to each component of each layer, in the table below"
    drawn = wide_figure(figure, "plan-map", described, 130 + room * len(setting.layers))
    return f"""<section>
<h2>The plan, component by component</h2>
<p class="note">{markup(note)}. Point at a cell for its numbers.</p>
{legend}{drawn}{_folded_table(content, plan)}</section>
"""


def _sparsity_map(content: Content, plan: Plan) -> go.Figure:
    """Layer × component, coloured by sparsity."""
    figure = _blank(content, plan)
    shares = [
        [_sparsity(plan.configuration[c.path]) if c and c.path in plan.configuration else None for c in row]
        for row in content.setting.grid
    ]
    numbered = len(content.setting.layers) <= _NUMBERED_LAYERS
    ticks = [0.0, 0.25, 0.5, 0.75, 1.0]
    figure.add_heatmap(
        z=shares,
        zmin=0,
        zmax=1,
        colorscale="Blues",
        colorbar=colour_bar("sparsity", ticks, [percent(tick) for tick in ticks]),
        text=[
            [f"{100 * share:.0f}" if share is not None and numbered else "" for share in row]
            for row in shares
        ],
        **_cells(content, plan),
    )
    finish_grid(figure, content.setting, above=60)
    return figure


def _treatment_map(content: Content, plan: Plan) -> go.Figure:
    """Layer × component, a colour and a letter for each treatment."""
    figure = _blank(content, plan)
    places = {key: place for place, key in enumerate(_treatments(content, plan))}
    found = [
        [places[plan.configuration[c.path].key] if c and c.path in plan.configuration else None for c in row]
        for row in content.setting.grid
    ]
    scale = []
    for place in places.values():
        colour = _COLOURS[place % len(_COLOURS)][0]
        scale += [[place / len(places), colour], [(place + 1) / len(places), colour]]
    figure.add_heatmap(
        z=found,
        zmin=-0.5,
        zmax=len(places) - 0.5,
        colorscale=scale,
        showscale=False,
        text=[["" if place is None else _letter(place, len(places)) for place in row] for row in found],
        **_cells(content, plan),
    )
    finish_grid(figure, content.setting, above=10)
    return figure


def _blank(content: Content, plan: Plan) -> go.Figure:
    figure = go.Figure()
    kept = [[c is not None and c.path not in plan.configuration for c in row] for row in content.setting.grid]
    texts = [[f"<b>{escape(c.path)}</b><br>kept" if c else "" for c in row] for row in content.setting.grid]
    add_blank(figure, content.setting, kept, texts)
    return figure


def _cells(content: Content, plan: Plan) -> dict[str, object]:
    """What the treated cells of both maps have."""
    texts = [
        [
            _hover(content, c, plan.configuration[c.path]) if c and c.path in plan.configuration else ""
            for c in row
        ]
        for row in content.setting.grid
    ]
    return {
        "hovertext": texts,
        "hovertemplate": "%{hovertext}<extra></extra>",
        "texttemplate": "%{text}",
        **on_grid(content.setting),
    }


def _hover(content: Content, component: ListedComponent, treatment: Treatment) -> str:
    bits = treatment.bits(*component.shape) / component.numel
    lines = [f"<b>{escape(component.path)}</b>", escape(treatment.key), f"{number(bits)} bits a weight"]
    if isinstance(content.search, Rounds):
        lines.append(f"after each round: {', '.join(_by_round(content.search, component.path))}")
    if (alone := content.alone.get((component.path, treatment.key))) is not None:
        others = measured_with(component, alone)
        lines.append(f"<i>alone{', with ' if others else ''}{escape(others)}:</i>")
        lines += measured_lines(content, alone)
    return "<br>".join([*lines, f"{component.numel:,} parameters"])


def _legend(content: Content, plan: Plan) -> list[str]:
    counts = Counter(treatment.key for treatment in plan.configuration.values())
    keys = [
        _swatch(
            _COLOURS[place % len(_COLOURS)][0], _letter(place, len(counts)), f"{key}: {counts[key]}", place
        )
        for place, key in enumerate(_treatments(content, plan))
    ]
    if kept := len(content.setting.components) - len(plan.configuration):
        keys.append(_swatch("#ffffff", "", f"kept: {kept}"))
    return keys


def _swatch(colour: str, letter: str, name: str, place: int = 0) -> str:
    style = f"background:{colour};color:{_COLOURS[place % len(_COLOURS)][1]}"
    return f'<span class="key"><span class="swatch" style="{style}">{letter}</span> {markup(name)}</span>'


def _folded_table(content: Content, plan: Plan) -> str:
    heads = ["component", "treatment", "bits a weight"]
    rounds = content.search if isinstance(content.search, Rounds) else None
    alone = {path: content.alone.get((path, each.key)) for path, each in plan.configuration.items()}
    shows_alone = any(alone.values())
    if rounds is not None:
        heads.append("sparsity after each round")
    if shows_alone:
        heads += ["FDT_75 alone", "mean FDT alone", "95% interval"]
    rows = []
    for path, component in content.setting.components.items():
        if (treatment := plan.configuration.get(path)) is None:
            continue
        row = [path, treatment.key, number(treatment.bits(*component.shape) / component.numel)]
        if rounds is not None:
            row.append(", ".join(_by_round(rounds, path)))
        if shows_alone:
            measurement = alone[path]
            fdt = None if measurement is None else measurement.summary("fdt")
            row += [number(fdt.p75), number(fdt.mean), interval(fdt.mean_interval)] if fdt else ["", "", ""]
        rows.append(row)
    treated = counted(len(plan.configuration), "treated component")
    return folded(f"The plan as a table: {treated}, in depth order", table(heads, rows, left=[0, 1]))


def _by_round(search: Rounds, path: str) -> list[str]:
    return [percent(after.get(path, 0.0)) for after in search.sparsities]


def _treatments(content: Content, plan: Plan) -> list[str]:
    """The keys of the plan's treatments, those that leave most bits first."""
    bits: Counter[str] = Counter()
    weights: Counter[str] = Counter()
    for path, treatment in plan.configuration.items():
        component = content.setting.components[path]
        bits[treatment.key] += treatment.bits(*component.shape)
        weights[treatment.key] += component.numel
    return sorted(bits, key=lambda key: (-bits[key] / weights[key], key))


def _letter(place: int, treatments: int) -> str:
    """What tells a treatment from the others in print; a single one needs none."""
    return ascii_uppercase[place % len(ascii_uppercase)] if treatments > 1 else ""


def _is_pruning(plan: Plan) -> bool:
    """Whether one kind of pruning is all that is done, so that how much is dropped says everything."""
    kinds = {type(treatment) for treatment in plan.configuration.values()}
    return len(kinds) == 1 and kinds <= {Prune, SparseGPT}


def _sparsity(treatment: Treatment) -> float:
    assert isinstance(treatment, (Prune, SparseGPT))
    pattern = pattern_of(treatment.sparsity)
    return float(treatment.sparsity) if pattern is None else 1 - pattern[0] / pattern[1]
