"""How a report writes its numbers and names."""

from collections.abc import Collection, Mapping, Sequence
from html import escape
from typing import Any

from dtm_fast.measure import Floor, Measurement
from dtm_fast.report.content import Content
from dtm_fast.report.setting import ListedComponent

RANKING_NAMES = {"fdt75": "FDT_75", "dppl": "DPPL", "perplexity": "perplexity", "kl": "KL"}
METRIC_NAMES = {
    "sdt": "SDT",
    "dppl": "DPPL",
    "perplexity": "perplexity",
    "agreement": "same top p",
    "kl": "KL",
}


def markup(text: str) -> str:
    """``text`` as HTML that shows it, with FDT_75 as it is printed."""
    return escape(text).replace("FDT_75", "FDT<sub>75</sub>")


def number(value: float) -> str:
    """Four significant digits, or all of a large number: with fewer, a mean just below N would read as N."""
    # A model that is pruned too far has a DPPL of any size.
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.4g}"


def percent(share: float) -> str:
    """``7.25%``, of a share in 0 … 1."""
    return f"{100 * share:.3g}%"


def interval(ends: tuple[float, float]) -> str:
    """``12.5 to 31``."""
    return f"{number(ends[0])} to {number(ends[1])}"


def counted(count: int, name: str) -> str:
    """``1 round``, ``8 rounds``."""
    return f"{count:,} {name}" if count == 1 else f"{count:,} {name}s"


def listed(names: Sequence[str]) -> str:
    """``a, b and c``."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def together(paths: Collection[str]) -> str:
    """One component's path; of several in one module ``model.layers.3.self_attn.k_proj, q_proj, v_proj``."""
    first, *others = paths
    return ", ".join([first, *(path.rpartition(".")[2] for path in others)])


def duration(seconds: float) -> str:
    """``41 s``, ``3 min 20 s``, ``2 h 5 min``."""
    if seconds < 100:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 100:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def plain(value: object) -> str:
    """A value of run.json as words."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {plain(entry)}" for key, entry in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(plain, value))
    return str(value)


def facts(values: Mapping[str, Any]) -> str:
    """Names and values of a part of run.json in one line."""
    return " · ".join(f"{name} {plain(value)}" for name, value in values.items())


def floor_sentence(floor: Floor) -> str:
    """The base against itself, in one sentence."""
    compared = f"batch size {floor.batch_size} instead of {floor.other_batch_size}"
    if floor.divergent:
        found = f"leaves its own text at {floor.divergent:,} of {floor.positions:,} positions"
        if floor.fdt is not None:
            found += f" (mean FDT {number(floor.fdt)}: no treatment near that is told from rounding)"
    else:
        found = f"never leaves its own text ({floor.positions:,} positions)"
    return (
        f"Read at {compared}, the uncompressed base {found}; rounding moves its decisions by at most "
        f"{floor.margin:.2g} logits, and first divergences within that are counted as ties."
    )


def measured_with(component: ListedComponent, measurement: Measurement) -> str:
    """``q_proj and v_proj``: what was treated together with the component; empty where nothing was."""
    return listed([path.rpartition(".")[2] for path in measurement.configuration if path != component.path])


def measured_lines(content: Content, measurement: Measurement) -> list[str]:
    """What was measured, in lines of Plotly's HTML."""
    if not measurement.finite:
        return ["its logits are not finite: counted as diverging at every token"]
    fdt = measurement.summary("fdt")
    lines = [
        f"FDT<sub>75</sub> {number(fdt.p75)} of {measurement.completion} tokens",
        f"mean FDT {number(fdt.mean)} (95% interval {interval(fdt.mean_interval)})",
    ]
    if measurement.sdt is not None:
        lines.append(f"SDT {number(measurement.summary('sdt').mean)}")
    if measurement.dppl is not None:
        lines.append(f"DPPL {number(measurement.summary('dppl').mean)}")
    ties = int(measurement.ties(content.setting.floor.margin).sum())
    return [*lines, f"ties inside the floor: {ties} of {len(measurement.fdt)} probes"]
