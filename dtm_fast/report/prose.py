"""The sections of the page that are only words: what the numbers mean, and how the run was run."""

import shlex

from dtm_fast.plan import in_order
from dtm_fast.report.content import Content
from dtm_fast.report.wording import RANKING_NAMES, duration, facts, markup


def meanings(content: Content) -> str:
    """What the numbers mean."""
    n = content.setting.completion
    words = {
        "FDT": "The first divergent token. The base model writes a greedy completion once; the compressed model "
        "reads it and says at each token what it would have chosen. FDT is how many of the "
        f"{n} tokens pass before it would have chosen another. {n} means that it never would have: "
        "longer agreement cannot be seen here.",
        "FDT_75": "The 75th percentile of FDT over the probes: a quarter of them agree at least that far. "
        f"It stands at {n} as soon as a quarter never diverges, so the colours show the mean.",
        "SDT": f"The number of divergent tokens, 0 to {n}, always given the base's text before them; "
        "lower is better.",
        "DPPL": "The perplexity that the compressed model assigns to the base's completion; lower is better. "
        "The base's own is not 1.",
        "95% interval": f"By bootstrap over the {content.setting.probes} probes: how much the choice of probes "
        "alone could move the number.",
        "ties": "Probes whose first divergence was decided by no more than the floor's margin: rounding alone "
        "could do it.",
    }
    return _definitions("What the numbers mean", "words", words)


def how_it_was_run(content: Content) -> str:
    """Command, model, probes, machine, versions and time."""
    setting, floor = content.setting, content.setting.floor
    corrected = (
        f"{floor.corrected} tokens that decoding with a cache chose otherwise were corrected"
        if floor.corrected
        else "decoding with a cache chose the same tokens as a full pass"
    )
    rows = {
        "command": shlex.join(setting.command),
        "last started": setting.started.replace("T", " "),
        "model": f"{setting.model} · {setting.model_type} · {setting.parameters:,} parameters · {setting.dtype}",
        "probes": f"{setting.probes} from {setting.text}, {setting.prefix} tokens of prefix and "
        f"{setting.completion} of completion, batch size {floor.batch_size}; {corrected}",
        "plan": _stop(content),
        "measured": f"{content.measurements} measurements in {duration(content.seconds)} of measuring",
        "machine": facts(setting.machine),
        "versions": facts(setting.versions),
    }
    return _definitions("How it was run", "how", rows)


def _stop(content: Content) -> str:
    if content.plan is None:
        return "not written yet"
    if content.plan.search != in_order.SEARCH:
        return content.plan.search
    stop = content.plan.how["stop"]
    asked = {"components": stop["components"], "share": stop["share"], "least FDT_75": stop["min_fdt"]}
    given = ", ".join(f"{name} {value:g}" for name, value in asked.items() if value is not None)
    ranking = RANKING_NAMES.get(content.plan.how["ranked_by"], content.plan.how["ranked_by"])
    return f"in order of {ranking}; stop: {given or 'none, all components'}"


def _definitions(title: str, kind: str, rows: dict[str, str]) -> str:
    inside = "".join(f"<dt>{markup(name)}</dt><dd>{markup(value)}</dd>" for name, value in rows.items())
    return f'<section><h2>{title}</h2><dl class="{kind}">{inside}</dl></section>\n'
