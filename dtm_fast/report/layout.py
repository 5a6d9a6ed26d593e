"""What the figures of the page share: colours, axes, the grid of components, the diamond that is the plan."""

from html import escape
from typing import Any

import plotly.graph_objects as go

from dtm_fast.report.setting import Setting

INK = "#1f2933"
GRID = "#e3e7ec"
ABSENT = "#d5dae0"
DOT = "#9aa5b1"
DARK = "#52606d"
# Okabe-Ito colours, told apart by all common kinds of colour vision.
LINES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Liberation Sans', sans-serif"
HOVER = "%{text}<extra></extra>"
FEW = 60
"""Up to so many points of a line are dots."""
_ROW_HEIGHT = 27
# Plotly leaves out what is said of a cell where it is higher than the figure.
_LEAST_HEIGHT = 240


def layout() -> dict[str, Any]:
    """Of every figure."""
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


def curve_layout(over: str, **axis: Any) -> dict[str, Any]:
    """Of a figure with lines.

    Args:
        over: what the horizontal axis is.
        **axis: more of the horizontal axis.
    """
    common = {
        "gridcolor": GRID,
        "zeroline": False,
        "automargin": True,
        "linecolor": DOT,
        "showline": True,
    }
    return {
        **layout(),
        "height": 290,
        "margin": {"l": 8, "r": 14, "t": 34, "b": 44},
        "plot_bgcolor": "#ffffff",
        "xaxis": {**common, "title": over, **axis},
        "yaxis": common,
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
    }


def whole_ticks(count: int) -> dict[str, Any]:
    """More of a horizontal axis of so many whole numbers: none between them is named."""
    return {"tickformat": "d"} | ({"dtick": 1} if count <= 10 else {})


def colour_bar(title: str, values: list[float], texts: list[str]) -> dict[str, Any]:
    """A horizontal one over the whole width of the figure, with a text at each value."""
    return {
        "orientation": "h",
        "title": {"text": title, "side": "top", "font": {"size": 12}},
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
        "tickvals": values,
        # Of the label at the end half stands beyond the bar.
        "ticklabeloverflow": "allow",
        "ticktext": texts,
    }


def on_grid(setting: Setting) -> dict[str, Any]:
    """What every trace has whose cells are ``Setting.grid``."""
    return {
        "x": setting.layers,
        # Plotly reads a small HTML of its own in every text, so names from the model are escaped here too.
        "y": [escape(name) for name in setting.names],
        "hoverongaps": False,
        "xgap": 2,
        "ygap": 2,
    }


def add_blank(figure: go.Figure, setting: Setting, cells: list[list[bool]], texts: list[list[str]]) -> None:
    """White cells with a text, for components of which there is nothing to colour."""
    figure.add_heatmap(
        z=[[0 if cell else None for cell in row] for row in cells],
        colorscale=[[0, "#ffffff"], [1, "#ffffff"]],
        showscale=False,
        text=texts,
        hovertemplate=HOVER,
        **on_grid(setting),
    )


def finish_grid(figure: go.Figure, setting: Setting, above: int) -> None:
    """The axes of a figure whose cells are components; ``above`` is the room over them, in pixels."""
    figure.update_layout(
        **layout(),
        height=max(_ROW_HEIGHT * len(setting.names) + above + 44, _LEAST_HEIGHT),
        margin={"l": 8, "r": 16, "t": 10, "b": 44},
        plot_bgcolor=ABSENT,
    )
    figure.update_xaxes(title="layer", showgrid=False, zeroline=False, ticks="", tickangle=0)
    figure.update_xaxes(**whole_ticks(len(setting.layers)))
    figure.update_yaxes(type="category", autorange="reversed", dtick=1, showgrid=False, automargin=True)
    # The names stay off the cells.
    figure.update_yaxes(ticks="", ticklabelstandoff=6)


def add_diamond(figure: go.Figure, x: float, y: Any, text: str) -> None:
    """The plan's own point."""
    figure.add_scatter(
        x=[x],
        y=[y],
        text=[f"<b>the plan</b><br>{text}"],
        hovertemplate=HOVER,
        mode="markers",
        name="the plan",
        showlegend=False,
        cliponaxis=False,
        marker={"size": 14, "symbol": "diamond", "color": "#ffffff", "line": {"color": INK, "width": 2.5}},
    )
