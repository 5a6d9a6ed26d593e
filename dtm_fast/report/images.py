"""The pictures for places without JavaScript, by matplotlib."""

from io import BytesIO

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from dtm_fast.report.content import Content, Sweep

_DPI = 150
_INK = "#1f2933"
_ABSENT = "#d5dae0"
_LINES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")


def heat_map_png(content: Content) -> bytes:
    """Layer × component, coloured by mean FDT; one panel per treatment, all on one scale."""
    setting = content.setting
    rows, columns = len(setting.names), len(setting.layers)
    width = min(max(7.0, 0.3 * columns + 2.8), 24.0)
    panel = min(max(1.6, 0.32 * rows), 40.0) + 1.3
    figure = Figure(figsize=(width, panel * len(content.sweeps)), dpi=_DPI, layout="constrained")
    panels = figure.subplots(len(content.sweeps), 1, squeeze=False)[:, 0]
    low, high = content.fdt_range
    for axes, sweep in zip(panels, content.sweeps, strict=True):
        mesh = axes.pcolormesh(
            *np.meshgrid(np.arange(columns + 1) - 0.5, np.arange(rows + 1) - 0.5),
            _means(content, sweep),
            cmap="viridis",
            norm=Normalize(low, high),
            edgecolors="white",
            linewidth=1.2,
            zorder=2,
        )
        _label_heat_map(axes, content, sweep)
        bar = figure.colorbar(mesh, ax=axes, pad=0.015, fraction=0.03, aspect=16)
        bar.set_label("mean FDT, tokens", color=_INK)
        bar.outline.set_visible(False)
        bar.ax.tick_params(length=0, labelsize=8)
    return _png(figure)


def curve_png(content: Content) -> bytes:
    """FDT, SDT and DPPL of the joint configurations over the share of parameters converted."""
    figure = Figure(figsize=(11.0, 3.7), dpi=_DPI, layout="constrained")
    fdt_axes, sdt_axes, dppl_axes = figure.subplots(1, 3)
    for place, curve in enumerate(content.curves):
        colour = _LINES[place % len(_LINES)]
        prefix = f"{curve.treatment}: " if len(content.curves) > 1 else ""
        shares = [100 * point.share for point in curve.points]
        low, high = zip(*(point.fdt_interval for point in curve.points), strict=True)
        fdt_axes.fill_between(shares, low, high, color=colour, alpha=0.14, linewidth=0)
        lines = (
            (fdt_axes, "fdt", ":", f"{prefix}mean FDT, 95% interval"),
            (fdt_axes, "fdt75", "-", f"{prefix}$\\mathrm{{FDT}}_{{75}}$"),
            (sdt_axes, "sdt", "-", curve.treatment),
            (dppl_axes, "dppl", "-", curve.treatment),
        )
        for axes, name, style, label in lines:
            values = [np.nan if (v := getattr(point, name)) is None else v for point in curve.points]
            axes.plot(shares, values, style, color=colour, marker="o", markersize=3, label=label)
            if curve.chosen is not None:
                chosen = curve.points.index(curve.chosen)
                axes.plot(
                    shares[chosen],
                    values[chosen],
                    "D",
                    markersize=8,
                    markerfacecolor="white",
                    markeredgecolor=_INK,
                    markeredgewidth=1.8,
                    clip_on=False,
                    zorder=5,
                    label="the plan" if name == "fdt75" else None,
                )
    titles = {fdt_axes: "FDT, tokens", sdt_axes: "SDT, tokens (mean)", dppl_axes: "DPPL (mean)"}
    for axes, title in titles.items():
        axes.set_title(title, fontsize=10, color=_INK, loc="left")
        axes.set_xlabel("% of parameters converted", color=_INK)
        axes.set_xlim(0, 103)
        axes.grid(color="#e3e7ec")
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    fdt_axes.set_ylim(0, content.setting.completion * 1.06)
    sdt_axes.set_ylim(bottom=0)
    # An offset such as "+2.32" above the axis is easily overlooked.
    dppl_axes.ticklabel_format(axis="y", useOffset=False)
    fdt_axes.legend(fontsize=8, frameon=False)
    treatments = " and ".join(curve.treatment for curve in content.curves)
    title = f"{_short(content.setting.model)}: components converted jointly to {treatments}"
    figure.suptitle(title, fontsize=11, color=_INK, parse_math=False)
    return _png(figure)


def _means(content: Content, sweep: Sweep) -> "np.ma.MaskedArray[tuple[int, int], np.dtype[np.float64]]":
    """Mean FDT [names, layers]; masked where nothing was measured."""
    setting = content.setting
    row = {name: place for place, name in enumerate(setting.names)}
    column = {layer: place for place, layer in enumerate(setting.layers)}
    means = np.full((len(row), len(column)), np.nan)
    for path, measurement in sweep.measured.items():
        component = setting.components[path]
        means[row[component.name], column[component.layer]] = measurement.summary("fdt").mean
    return np.ma.masked_array(means, mask=np.isnan(means))


def _label_heat_map(axes: Axes, content: Content, sweep: Sweep) -> None:
    setting = content.setting
    rows, columns = len(setting.names), len(setting.layers)
    # Outlined white where a component waits to be measured, grey where the layer has none of that name.
    paths = {(c.name, c.layer): path for path, c in setting.components.items()}
    for row, name in enumerate(setting.names):
        for column, layer in enumerate(setting.layers):
            path = paths.get((name, layer))
            if path not in sweep.measured:
                face = "white" if path else _ABSENT
                cell = Rectangle((column - 0.46, row - 0.46), 0.92, 0.92, facecolor=face, edgecolor=_ABSENT)
                axes.add_patch(cell).set_zorder(3)
    axes.set_yticks(range(rows), setting.names, fontsize=8, parse_math=False)
    axes.invert_yaxis()
    axes.xaxis.set_major_locator(MaxNLocator(nbins=16, integer=True))
    axes.xaxis.set_major_formatter(lambda x, _: str(setting.layers[int(x)]) if 0 <= x < columns else "")
    axes.tick_params(length=0, labelsize=8)
    axes.set_xlabel("layer", color=_INK)
    axes.spines[:].set_visible(False)
    done, total = len(sweep.measured), len(setting.components)
    unfinished = f", {done} of {total} measured" if done < total else ""
    axes.set_title(
        f"{_short(setting.model)}\neach component alone in {sweep.treatment}"
        f" ({setting.probes} probes, N = {setting.completion}{unfinished})",
        fontsize=10,
        color=_INK,
        loc="left",
        parse_math=False,
    )


def _short(model: str) -> str:
    """A model's name that fits above a picture; of a long path the end tells most."""
    return model if len(model) <= 40 else f"…{model[-39:]}"


def _png(figure: Figure) -> bytes:
    FigureCanvasAgg(figure)
    stream = BytesIO()
    figure.savefig(stream, format="png", facecolor="white")
    return stream.getvalue()
