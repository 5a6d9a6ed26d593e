"""The page: one HTML file with everything in it, which asks nothing of any network."""

from html import escape

from plotly.offline import get_plotlyjs

from dtm_fast.report.baselines import baselines_section
from dtm_fast.report.content import Content, Sweep
from dtm_fast.report.elements import folded, small_figure, wide_figure
from dtm_fast.report.figures import dppl_curve, fdt_curve, heat_map, sdt_curve
from dtm_fast.report.headlines import headline, tiles
from dtm_fast.report.plan_map import map_section
from dtm_fast.report.progress import progress_section
from dtm_fast.report.prose import how_it_was_run, meanings
from dtm_fast.report.recovery import recovery_section
from dtm_fast.report.style import STYLE
from dtm_fast.report.tables import curve_table, sweep_table
from dtm_fast.report.wording import RANKING_NAMES, counted, floor_sentence, listed, markup, number

# The browser itself refuses whatever is not in this file.
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
# At the end of the page, when every place has the width that it will keep.
_DRAW = """
for (const place of document.querySelectorAll(".figure")) {
  const figure = JSON.parse(place.nextElementSibling.textContent);
  Plotly.newPlot(place, figure.data, figure.layout, {displayModeBar: false, responsive: true});
}
"""


def page(content: Content) -> str:
    """The whole of ``report.html``: what came out first, then what it comes from."""
    model = escape(content.setting.model)
    sections = [
        _top(content),
        map_section(content),
        progress_section(content),
        _curves(content),
        baselines_section(content),
        recovery_section(content),
        *(_sweep(content, sweep, place) for place, sweep in enumerate(content.sweeps)),
        meanings(content),
        how_it_was_run(content),
    ]
    picture = "heatmap.png lies beside this file, and " if content.sweeps else ""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>dtm-fast: {model}</title>
<style>{STYLE}</style>
<script>{get_plotlyjs()}</script>
</head>
<body>
<main>
<header><p>dtm-fast report</p><h1>{model}</h1></header>
<noscript><p>The figures need JavaScript; {picture}the tables need none.</p></noscript>
{"".join(sections)}
</main>
<script>{_DRAW}</script>
</body>
</html>
"""


def _top(content: Content) -> str:
    paragraphs = "".join(f'<p class="headline">{markup(text)}</p>' for text in headline(content))
    numbers = "".join(
        f"<div><dt>{markup(name)}</dt><dd>{markup(value)}<small>{markup(more)}</small></dd></div>"
        for name, value, more in tiles(content)
    )
    return f"""<section aria-label="result">
{paragraphs}
<dl class="tiles">{numbers}</dl>
<p class="note floor"><b>Floor.</b> {markup(floor_sentence(content.setting.floor))}</p>
</section>
"""


def _sweep(content: Content, sweep: Sweep, place: int) -> str:
    setting = content.setting
    low, high = content.fdt_range
    note = (
        f"Mean FDT over {setting.probes} probes, on a scale from {number(low)} to its ceiling of {number(high)} "
        "tokens. Point at a cell for its numbers."
    )
    if sweep.fused:
        note += " Components that are treated together were measured together and show the same."
    keys = ""
    if len(sweep.measured) < len(setting.components):
        keys += ' <span class="swatch"></span> not measured yet.'
    if len(setting.components) < len(setting.names) * len(setting.layers):
        keys += ' <span class="swatch absent"></span> no such component in that layer.'
    described = (
        f"Heat map of the mean FDT of each component alone under {sweep.treatment}, in the table below"
    )
    width = 130 + 6 * len(setting.layers)
    drawn = wide_figure(heat_map(content, sweep), f"heat-map-{place}", described, width)
    measured = counted(len(sweep.ranked), "measured set" if sweep.fused else "measured component")
    ranking = f"Ranked by {RANKING_NAMES.get(sweep.ranked_by, sweep.ranked_by)}."
    inside = folded(f"All {measured}, the least harmful first", sweep_table(content, sweep), ranking)
    return f"""<section>
<h2>Each component alone in {markup(sweep.treatment)}</h2>
<p class="note">{markup(note)}{keys}</p>
{drawn}{inside}</section>
"""


def _curves(content: Content) -> str:
    if not content.curves:
        return ""
    n = content.setting.completion
    note = "Each dot is one joint measurement"
    if content.planned_curve is not None:
        note += "; the least harmful components come first"
    note += ", and the diamond is the plan." if any(curve.chosen for curve in content.curves) else "."
    drawn = [("FDT", f"tokens before the first divergence, at most {n}", fdt_curve(content))]
    drawn.append(("SDT", f"divergent tokens of {n}, mean", sdt_curve(content)))
    if any(point.dppl is not None for curve in content.curves for point in curve.points):
        drawn.append(("DPPL", "perplexity of the base's text, mean", dppl_curve(content)))
    figures = "".join(
        small_figure(
            figure, f"curve-{name.lower()}", name, unit, f"{name} over the share of parameters converted"
        )
        for name, unit, figure in drawn
    )
    treatments = listed([curve.treatment for curve in content.curves])
    return f"""<section>
<h2>Converted together to {markup(treatments)}</h2>
<p class="note">{markup(note)}</p>
<div class="curves">{figures}</div>
{folded("These measurements as a table", curve_table(content))}</section>
"""
