"""The sections of the page that are only words: what the numbers mean, and how the run was run."""

import shlex

from dtm_fast.report.content import Content
from dtm_fast.report.searches import Beam, InOrder, Joint, Rounds
from dtm_fast.report.wording import RANKING_NAMES, counted, duration, facts, listed, markup, number, percent


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
    if content.plan is not None or content.comparison is not None:
        words["effective bits"] = (
            "What a weight of a component takes on average, scales and masks included; 16 where nothing is treated. "
            "Embeddings, norms and the head are not counted."
        )
    if isinstance(content.search, Rounds):
        words["mean sparsity"] = "The share of all components' weights that is dropped."
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
        "plan": _plan(content),
        "measured": f"{content.measurements} measurements in {duration(content.seconds)} of measuring",
        "machine": facts(setting.machine),
        "versions": facts(setting.versions),
    }
    return _definitions("How it was run", "how", rows)


def _plan(content: Content) -> str:
    search = content.search
    if content.plan is None:
        return "not written yet"
    if isinstance(search, InOrder):
        asked = {"components": search.components, "share": search.share, "least FDT_75": search.min_fdt}
        given = ", ".join(f"{name} {value:g}" for name, value in asked.items() if value is not None)
        return f"in order of {_ranking(search.ranked_by)}; stop: {given or 'none, all components'}"
    if isinstance(search, Rounds):
        added = ", ".join(map(percent, search.steps))
        return f"{counted(len(search.steps), 'pruning round')}, which add {added} to the mean sparsity"
    if isinstance(search, Beam):
        looked_at = "all" if search.among is None else f"the {search.among} least harmful alone"
        return (
            f"beam of width {search.width} by {_ranking(search.by)}, to depth {len(content.plan.curve)}; "
            f"{listed(search.treatments)} of {counted(search.units, 'unit')}, {looked_at} at each depth"
        )
    if isinstance(search, Joint):
        budgets = listed([number(budget) for budget in search.budgets])
        confirmed = (
            "" if search.confirmed_on is None else f", confirmed on {search.confirmed_on} other probes"
        )
        return (
            f"joint search of {listed(search.treatments)} for {counted(search.units, 'unit')} within {budgets} "
            f"effective bits a weight, {counted(search.refinements, 'refinement')} each{confirmed}"
        )
    return content.plan.search


def _ranking(by: str) -> str:
    return RANKING_NAMES.get(by, by)


def _definitions(title: str, kind: str, rows: dict[str, str]) -> str:
    inside = "".join(f"<dt>{markup(name)}</dt><dd>{markup(value)}</dd>" for name, value in rows.items())
    return f'<section><h2>{title}</h2><dl class="{kind}">{inside}</dl></section>\n'
