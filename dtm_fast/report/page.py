"""The page: one HTML file with everything in it, which asks nothing of any network."""

from collections.abc import Iterable
from html import escape

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from dtm_fast.report.content import Content, Sweep
from dtm_fast.report.figures import dppl_curve, fdt_curve, heat_map, sdt_curve
from dtm_fast.report.prose import how_it_was_run, meanings
from dtm_fast.report.style import STYLE
from dtm_fast.report.tables import curve_table, sweep_table
from dtm_fast.report.wording import RANKING_NAMES, floor_sentence, headline, interval, markup, number

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
    """The whole of ``report.html``."""
    model = escape(content.setting.model)
    sections = [
        _top(content),
        *(_sweep(content, sweep, place) for place, sweep in enumerate(content.sweeps)),
        _curves(content),
        meanings(content),
        how_it_was_run(content),
    ]
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
<noscript><p>The figures need JavaScript; heatmap.png lies beside this file, and the tables need none.</p></noscript>
{"".join(sections)}
</main>
<script>{_DRAW}</script>
</body>
</html>
"""


def _top(content: Content) -> str:
    paragraphs = "".join(f'<p class="headline">{markup(text)}</p>' for text in headline(content))
    tiles = "".join(
        f"<div><dt>{markup(name)}</dt><dd>{markup(value)}<small>{markup(more)}</small></dd></div>"
        for name, value, more in _tiles(content)
    )
    return f"""<section aria-label="result">
{paragraphs}
<dl class="tiles">{tiles}</dl>
<p class="note floor"><b>Floor.</b> {markup(floor_sentence(content.setting.floor))}</p>
</section>
"""


def _tiles(content: Content) -> Iterable[tuple[str, str, str]]:
    setting, curve = content.setting, content.planned
    total = len(setting.components)
    if curve is not None and curve.chosen is not None:
        point = curve.chosen
        yield "converted", f"{point.components} of {total}", f"{point.share:.0%} of their parameters"
        yield "FDT_75", number(point.fdt75), f"of {setting.completion} tokens"
        yield "mean FDT", number(point.fdt), f"95% interval {interval(point.fdt_interval)}"
        yield "SDT", number(point.sdt), f"divergent tokens of {setting.completion}"
    else:
        for sweep in content.sweeps:
            done = f"{len(sweep.measured)} of {total}"
            yield f"{sweep.treatment}, alone", done, f"measured; {sweep.harmless} change no text"
    yield "measured on", f"{setting.probes} probes", f"of {setting.prefix} + {setting.completion} tokens"


def _sweep(content: Content, sweep: Sweep, place: int) -> str:
    setting = content.setting
    low, high = content.fdt_range
    note = (
        f"Mean FDT over {setting.probes} probes, on a scale from {number(low)} to its ceiling of {number(high)} "
        "tokens. Point at a cell for its numbers."
    )
    keys = ""
    if len(sweep.measured) < len(setting.components):
        keys += ' <span class="swatch"></span> not measured yet.'
    if len(setting.components) < len(setting.names) * len(setting.layers):
        keys += ' <span class="swatch absent"></span> no such component in that layer.'
    described = escape(
        f"Heat map of the mean FDT of each component alone under {sweep.treatment}, in the table below"
    )
    return f"""<section>
<h2>Each component alone in {markup(sweep.treatment)}</h2>
<p class="note">{markup(note)}{keys}</p>
<figure role="img" aria-label="{described}"><div class="scroll">
<div style="min-width:{130 + 6 * len(setting.layers)}px">{_figure(heat_map(content, sweep), f"heat-map-{place}")}</div>
</div></figure>
<details><summary>All {len(sweep.measured)} measured components, the least harmful first</summary>
<p class="note">Ranked by {markup(RANKING_NAMES.get(sweep.ranked_by, sweep.ranked_by))}.</p>
<div class="scroll">{sweep_table(content, sweep)}</div>
</details>
</section>
"""


def _curves(content: Content) -> str:
    if not content.curves:
        return ""
    n = content.setting.completion
    note = "Each dot is one joint measurement"
    if content.planned is not None:
        note += "; the least harmful components come first"
    note += ", and the diamond is the plan." if any(curve.chosen for curve in content.curves) else "."
    drawn = [("FDT", f"tokens before the first divergence, at most {n}", fdt_curve(content))]
    drawn.append(("SDT", f"divergent tokens of {n}, mean", sdt_curve(content)))
    if any(point.dppl is not None for curve in content.curves for point in curve.points):
        drawn.append(("DPPL", "perplexity of the base's text, mean", dppl_curve(content)))
    figures = "".join(
        f'<figure role="img" aria-label="{name} over the share of parameters converted">'
        f'<figcaption>{name} <span class="note">{escape(unit)}</span></figcaption>'
        f"{_figure(figure, f'curve-{name.lower()}')}</figure>"
        for name, unit, figure in drawn
    )
    treatments = " and ".join(curve.treatment for curve in content.curves)
    return f"""<section>
<h2>Converted together to {markup(treatments)}</h2>
<p class="note">{markup(note)}</p>
<div class="curves">{figures}</div>
<details><summary>These measurements as a table</summary><div class="scroll">{curve_table(content)}</div></details>
</section>
"""


def _figure(figure: go.Figure, identity: str) -> str:
    """The figure's place and its data; ``_DRAW`` draws it."""
    height = figure.layout.height
    return (
        f'<div class="figure" id="{identity}" style="height:{height}px"></div>'
        # Plotly writes "<" inside its JSON as an escape, so that no text can end the script element.
        f'<script type="application/json">{figure.to_json()}</script>'
    )
