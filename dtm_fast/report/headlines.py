"""The main result of a run, in one or two sentences."""

from collections import Counter
from collections.abc import Iterable

from dtm_fast.plan import Plan, Point
from dtm_fast.report.content import Content, Curve, CurvePoint, Sweep
from dtm_fast.report.searches import Beam, InOrder, Joint, Rounds
from dtm_fast.report.wording import counted, interval, listed, number, percent, together


def headline(content: Content) -> list[str]:
    """The main result: a paragraph, or one for each treatment while there is no plan."""
    plan, search, curve = content.plan, content.search, content.planned_curve
    if plan is None:
        return [_swept(content, sweep) for sweep in content.sweeps] or [
            f"{content.measurements} joint configurations measured; no plan is written yet."
        ]
    if not plan.configuration:
        return [_empty(content)]
    if isinstance(search, InOrder) and curve is not None and curve.chosen is not None:
        return [_in_order(content, search, curve, curve.chosen)]
    assert plan.chosen is not None  # read_plan refuses it
    if isinstance(search, Rounds):
        return [_rounds(content, search, plan.chosen), *_most_pruned(content, search)]
    if isinstance(search, Joint):
        return [_joint(content, plan, search, plan.chosen)]
    return [_converted(content, plan, plan.chosen)]


def tiles(content: Content) -> Iterable[tuple[str, str, str]]:
    """Name, value and what else there is to say of the numbers at the top."""
    setting, plan, search = content.setting, content.plan, content.search
    total, n = len(setting.components), setting.completion
    if plan is not None and plan.chosen is not None:
        point = plan.chosen
        treated = f"{point.components} of {total}"
        if isinstance(search, Rounds):
            sparsity = search.mean_sparsities(setting)[-1]
            yield "mean sparsity", percent(sparsity), f"after {counted(len(search.steps), 'round')}"
        elif isinstance(search, Joint):
            yield "effective bits", number(point.bits), "of a weight, 16 at first"
            yield "compressed", treated, "components"
        else:
            yield "converted", treated, f"{point.share:.0%} of their parameters"
        yield "FDT_75", number(point.fdt75), f"of {n} tokens"
        ends = content.planned.summary("fdt").mean_interval if content.planned is not None else None
        yield "mean FDT", number(point.fdt), f"95% interval {interval(ends)}" if ends else f"of {n} tokens"
        if point.sdt is not None:
            yield "SDT", number(point.sdt), f"divergent tokens of {n}"
    else:
        for sweep in content.sweeps:
            done = f"{len(sweep.measured)} of {total}"
            yield f"{sweep.treatment}, alone", done, f"measured; {sweep.harmless} change no text"
    yield "measured on", f"{setting.probes} probes", f"of {setting.prefix} + {n} tokens"


def _empty(content: Content) -> str:
    search = content.search
    if isinstance(search, Joint):
        return (
            f"Within {number(search.budgets[0])} effective bits a weight nothing has to be compressed: "
            "the plan is empty."
        )
    if isinstance(search, Rounds):
        return "The rounds are too small to prune a single weight: the plan is empty."
    minimum = search.min_fdt if isinstance(search, InOrder) else None
    asked = f" with FDT_75 ≥ {number(minimum)}" if minimum is not None else ""
    return f"No component can be converted{asked}: the plan is empty."


def _in_order(content: Content, search: InOrder, curve: Curve, point: CurvePoint) -> str:
    n, minimum = content.setting.completion, search.min_fdt
    total = len(content.setting.components)
    subject = f"All {total}" if point.components == total else f"{point.components} of {total}"
    share = "" if point.components == total else f" ({point.share:.0%} of their parameters)"
    if minimum is not None:
        return (
            f"{subject} components{share} can be converted to {curve.treatment} with FDT_75 ≥ {number(minimum)}: "
            f"FDT_75 is then {number(point.fdt75)} of {n} tokens, the mean FDT {number(point.fdt)}."
        )
    result = (
        f"With {subject[0].lower() + subject[1:]} components{share} converted to {curve.treatment}, "
        f"{_does(content, point)}."
    )
    return result + _ceiling(curve.points, point, n)


def _converted(content: Content, plan: Plan, point: Point) -> str:
    """Of a beam, or of a search that is not known here."""
    total = len(content.setting.components)
    subject = f"all {total}" if point.components == total else f"{point.components} of {total}"
    share = "" if point.components == total else f" ({point.share:.0%} of their parameters)"
    treatments = list(dict.fromkeys(treatment.key for treatment in plan.configuration.values()))
    result = f"With {subject} components{share} converted to {listed(treatments)}, {_does(content, point)}."
    ends = _ceiling(plan.curve, point, content.setting.completion) if isinstance(content.search, Beam) else ""
    return result + ends


def _rounds(content: Content, search: Rounds, point: Point) -> str:
    sparsity = search.mean_sparsities(content.setting)[-1]
    return (
        f"Pruned to a mean sparsity of {percent(sparsity)} in {counted(len(search.steps), 'round')}, "
        f"{_does(content, point)}."
        + (f" Pruned uniformly, {_does(content, search.uniform[-1])}." if search.uniform else "")
    )


def _most_pruned(content: Content, search: Rounds) -> list[str]:
    """As the paper says it of its own (Deiseroth et al. 2023, papers.md §1.6)."""
    sparsities = search.sparsities[-1].values()
    most, gone = sum(each > 0.9 for each in sparsities), sum(each == 1 for each in sparsities)
    if not most:
        return []
    also = f", {gone} of them all" if gone else ""
    return [
        f"{most} of {len(content.setting.components)} components lose more than 90% of their weights{also}."
    ]


def _joint(content: Content, plan: Plan, search: Joint, point: Point) -> str:
    counts = Counter(treatment.key for treatment in plan.configuration.values())
    kinds = [
        f"{count} in {key}" for key, count in sorted(counts.items(), key=lambda each: (-each[1], each[0]))
    ]
    if kept := len(content.setting.components) - len(plan.configuration):
        kinds.append(f"{kept} as they were")
    where = (
        ""
        if search.confirmed_on is None
        else f" on {search.confirmed_on} probes that the search had not seen"
    )
    return (
        f"Within {number(search.budgets[0])} effective bits a weight, {_does(content, point)}{where}: "
        f"of {len(content.setting.components)} components {listed(kinds)}."
    )


def _does(content: Content, point: Point | CurvePoint) -> str:
    n = content.setting.completion
    return f"FDT_75 is {number(point.fdt75)} of {n} tokens and the mean FDT {number(point.fdt)}"


def _ceiling(points: Iterable[Point | CurvePoint], chosen: Point | CurvePoint, n: int) -> str:
    """How far FDT_75 stays at N, where that is not to the end."""
    last = None
    for point in points:
        if point.fdt75 < n:
            break
        last = point
    if last is None or last.components >= chosen.components:
        return ""
    return (
        f" Up to {counted(last.components, 'component')} ({last.share:.0%} of their parameters)"
        f" FDT_75 stays at its ceiling of {n}."
    )


def _swept(content: Content, sweep: Sweep) -> str:
    total, done = len(content.setting.components), len(sweep.measured)
    begun = (
        f"All {total} components are" if done == total else f"Unfinished: {done} of {total} components are"
    )
    if sweep.harmless == done:
        return f"{begun} measured alone under {sweep.treatment}; none changes any of the texts."
    lost = sum(not measurement.finite for measurement in sweep.measured.values())
    without = f" Under {lost} of them the logits are not finite, which counts as diverging at every token."
    worst = sweep.measured[sweep.ranked[-1]]
    return (
        f"{begun} measured alone under {sweep.treatment}; {sweep.harmless} of them change no text, "
        f"and {together(worst.configuration)} harms most (mean FDT {number(worst.summary('fdt').mean)} of "
        f"{content.setting.completion} tokens)." + (without if lost else "")
    )
