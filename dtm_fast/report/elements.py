"""The pieces of HTML that sections are made of."""

from collections.abc import Container, Iterable, Sequence
from html import escape

import plotly.graph_objects as go

from dtm_fast.report.wording import markup


def figure_place(figure: go.Figure, identity: str) -> str:
    """The figure's place and its data; the page's script draws it."""
    height = figure.layout.height
    return (
        f'<div class="figure" id="{identity}" style="height:{height}px"></div>'
        # Plotly writes "<" inside its JSON as an escape, so that no text can end the script element.
        f'<script type="application/json">{figure.to_json()}</script>'
    )


def wide_figure(figure: go.Figure, identity: str, described: str, width: int) -> str:
    """A figure over the whole width, which scrolls where there are fewer than ``width`` pixels."""
    return f"""<figure role="img" aria-label="{escape(described)}"><div class="scroll">
<div style="min-width:{width}px">{figure_place(figure, identity)}</div>
</div></figure>
"""


def small_figure(figure: go.Figure, identity: str, name: str, unit: str, described: str) -> str:
    """One of several figures beside each other, under its name."""
    return (
        f'<figure role="img" aria-label="{escape(described)}">'
        f'<figcaption>{markup(name)} <span class="note">{markup(unit)}</span></figcaption>'
        f"{figure_place(figure, identity)}</figure>"
    )


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], left: Container[int] = ()) -> str:
    """A table of texts; the columns in ``left`` are left-aligned."""

    def aligned(column: int) -> str:
        return ' class="left"' if column in left else ""

    head = "".join(f'<th scope="col"{aligned(place)}>{markup(name)}</th>' for place, name in enumerate(heads))
    body = "".join(
        f"<tr>{''.join(f'<td{aligned(place)}>{escape(cell)}</td>' for place, cell in enumerate(row))}</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def folded(summary: str, table: str, note: str = "") -> str:
    """A table that opens at a click."""
    said = f'<p class="note">{markup(note)}</p>' if note else ""
    return f'<details><summary>{markup(summary)}</summary>{said}<div class="scroll">{table}</div></details>\n'
