"""The two pictures of a report: a roofline, and our speed beside the peers'."""

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

_ROOFS = {
    "fp32_fma": "#1b6ca8",
    "bf16_dot": "#3a8f3a",
    "int8_vnni": "#b5532a",
    "bf16_amx": "#8fce8f",
    "int8_amx": "#eaa27f",
    "fp32_in_bf16_amx": "#8db8dd",
}
_MARKERS = {"int8_linear": "o", "masked_linear": "s", "token_divergence": "^"}


def roofline(report: dict[str, Any], path: Path) -> None:
    """Operations per second over operations per byte, under the measured roofs."""
    best = report["limits"]["best"]
    figure, axes = plt.subplots(figsize=(9, 5.5), layout="constrained")
    rows = [row for row in report["rows"] if row["gflops"] is not None]
    intensities = [row["flops"] / row["bytes"] for row in rows] or [1.0]
    low, high = min(intensities) / 2, max(intensities) * 2
    for name, colour in _ROOFS.items():
        if name not in best or "read" not in best:
            continue
        knee = best[name] / best["read"]
        xs = sorted({low, min(max(knee, low), high), high})
        ys = [min(best[name], best["read"] * x) for x in xs]
        unit = "GOP/s" if name.startswith("int8") else "GFLOP/s"
        axes.plot(xs, ys, color=colour, label=f"{name}: {best[name]:,.0f} {unit}")
    for operation, marker in _MARKERS.items():
        chosen = [row for row in rows if row["op"] == operation]
        if chosen:
            axes.scatter(
                [row["flops"] / row["bytes"] for row in chosen],
                [row["gflops"] for row in chosen],
                c=[_ROOFS[row["arithmetic"][0]] for row in chosen],
                marker=marker,
                edgecolors="black",
                linewidths=0.5,
                zorder=3,
                label=operation,
            )
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="operations per byte that must move",
        ylabel="10⁹ operations per second",
        title=f"Roofline, {report['machine']['cpu_model']}, {report['limits']['threads']} threads"
        + (f", read {best['read']:.0f} GB/s" if "read" in best else ""),
    )
    axes.grid(True, which="both", alpha=0.2)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def bars(report: dict[str, Any], path: Path) -> None:
    """For each row and peer, how many times as fast we are; 1 is even, and left of it we lose."""
    rows = [row for row in report["rows"] if row["speedup_vs"]]
    peers = sorted({peer for row in rows for peer in row["speedup_vs"]})
    colours = dict(zip(peers, plt.get_cmap("tab20").colors, strict=False))  # type: ignore[attr-defined]
    lines = sum(len(row["speedup_vs"]) + 1 for row in rows)
    figure, axes = plt.subplots(figsize=(9, max(2.0, 0.16 * lines + 1.2)), layout="constrained")
    at, ticks = 0.0, []
    for row in rows:
        start = at
        for peer, ratio in row["speedup_vs"].items():
            if ratio is not None:
                axes.barh(at, ratio - 1, left=1, height=0.9, color=colours.get(peer, "grey"))
            at += 1
        ticks.append(((start + at - 1) / 2, row["name"]))
        at += 1
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.set_yticks([tick for tick, _ in ticks], [name for _, name in ticks], fontsize=6)
    axes.invert_yaxis()
    axes.margins(y=0.005)
    axes.set_xlabel("times as fast as the peer (left of 1 the peer is faster)")
    handles = [plt.Rectangle((0, 0), 1, 1, color=colours.get(peer, "grey")) for peer in peers]
    axes.legend(handles, peers, fontsize=7, loc="best")
    axes.set_title(f"dtm_fast beside its peers, {report['machine']['cpu_model']}")
    figure.savefig(path, dpi=110)
    plt.close(figure)
