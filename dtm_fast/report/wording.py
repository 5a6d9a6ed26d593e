"""How a report writes its numbers and its main result."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from dtm_fast.measure import Floor
from dtm_fast.report.content import Content, Curve, CurvePoint, Sweep

RANKING_NAMES = {"fdt75": "FDT_75", "dppl": "DPPL", "perplexity": "perplexity"}
METRIC_NAMES = {"dppl": "DPPL", "perplexity": "perplexity", "agreement": "same top p", "kl": "KL"}


def markup(text: str) -> str:
    """``text`` as HTML that shows it, with FDT_75 as it is printed."""
    return escape(text).replace("FDT_75", "FDT<sub>75</sub>")


def number(value: float) -> str:
    """Four significant digits: with fewer, a mean just below N would read as N."""
    return f"{value:.4g}"


def interval(ends: tuple[float, float]) -> str:
    """``12.5 to 31``."""
    return f"{number(ends[0])} to {number(ends[1])}"


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
    else:
        found = f"never leaves its own text ({floor.positions:,} positions)"
    return (
        f"Read at {compared}, the uncompressed base {found}; rounding moves its decisions by at most "
        f"{floor.margin:.2g} logits, and first divergences within that are counted as ties."
    )


def headline(content: Content) -> list[str]:
    """The main result: a paragraph, or one for each treatment while there is no plan."""
    plan, curve = content.plan, content.planned
    if plan is not None and not plan.configuration:
        minimum = plan.how.get("stop", {}).get("min_fdt")
        asked = f" with FDT_75 ≥ {number(minimum)}" if minimum is not None else ""
        return [f"No component can be converted{asked}: the plan is empty."]
    if plan is not None and curve is not None and curve.chosen is not None:
        return [_planned(content, curve)]
    return [_swept(content, sweep) for sweep in content.sweeps] or [
        f"{content.measurements} joint configurations measured; no plan is written yet."
    ]


def _planned(content: Content, curve: Curve) -> str:
    assert content.plan is not None
    assert curve.chosen is not None
    point, n, minimum = curve.chosen, content.setting.completion, content.plan.how["stop"]["min_fdt"]
    total = len(content.setting.components)
    subject = f"All {total}" if point.components == total else f"{point.components} of {total}"
    share = "" if point.components == total else f" ({point.share:.0%} of their parameters)"
    if minimum is not None:
        return (
            f"{subject} components{share} can be converted to {curve.treatment} with FDT_75 ≥ {number(minimum)}: "
            f"FDT_75 is then {number(point.fdt75)} of {n} tokens, the mean FDT {number(point.fdt)}."
        )
    result = (
        f"With {subject[0].lower() + subject[1:]} components{share} converted to {curve.treatment}, FDT_75 is "
        f"{number(point.fdt75)} of {n} tokens and the mean FDT {number(point.fdt)}."
    )
    ceiling = _last_at_ceiling(curve, n)
    if ceiling is not None and ceiling.components < point.components:
        result += (
            f" Up to {ceiling.components} components ({ceiling.share:.0%} of their parameters)"
            f" FDT_75 stays at its ceiling of {n}."
        )
    return result


def _last_at_ceiling(curve: Curve, n: int) -> CurvePoint | None:
    last = None
    for point in curve.points:
        if point.fdt75 < n:
            break
        last = point
    return last


def _swept(content: Content, sweep: Sweep) -> str:
    total, done = len(content.setting.components), len(sweep.measured)
    begun = (
        f"All {total} components are" if done == total else f"Unfinished: {done} of {total} components are"
    )
    worst = sweep.ranked[-1]
    fdt = sweep.measured[worst].summary("fdt")
    if sweep.harmless == done:
        return f"{begun} measured alone under {sweep.treatment}; none changes any of the texts."
    return (
        f"{begun} measured alone under {sweep.treatment}; {sweep.harmless} of them change no text, "
        f"and {worst} harms most (mean FDT {number(fdt.mean)} of {content.setting.completion} tokens)."
    )
