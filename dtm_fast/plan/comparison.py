"""What choosing by FDT buys: the configurations that other criteria choose within the same budget."""

from collections.abc import Sequence

from dtm_fast.compression import Configuration, Treatment
from dtm_fast.measure import Measurement
from dtm_fast.plan.harms import MEASURED, PREDICTED, check_harms
from dtm_fast.plan.options import Choice, Options
from dtm_fast.plan.recorded import RecordedEvaluator
from dtm_fast.plan.units import Unit

_METRICS = ("dppl", "kl", "perplexity", "sdt")


def chosen_by(
    recorded: RecordedEvaluator,
    treatments: Sequence[Treatment],
    units: Sequence[Unit],
    budgets: Sequence[float],
    by: str,
) -> list[Configuration]:
    """For each budget the configuration whose single harms, by one criterion, add up to least.

    Args:
        recorded: measures every unit alone where the criterion is measured.
        treatments: which may be chosen; keeping a unit always may.
        units: what is treated together.
        budgets: effective bits of a component's weight on average.
        by: a name of ``MEASURED`` or ``PREDICTED`` (``plan.harms``).

    Raises:
        InputError: a criterion or a budget that cannot be had.
        ComponentError, TreatmentError: a treatment does not fit a component, or the criterion needs a calibration.
    """
    check_harms([by])
    options = Options(recorded.decoder, treatments, units)
    limits = [options.limit(budget) for budget in budgets]
    harms: dict[tuple[Unit, str], float] = {}
    if by in MEASURED:
        harm = MEASURED[by]
        base, *found = recorded.measure([{}, *options.alone()], harm.metrics)
        alone = iter(found)
        for unit in options.units:
            for treatment in options.treatments:
                harms[unit, treatment.key] = harm.of(next(alone)) - harm.of(base)
    else:
        paths = [path for unit in options.units for path in unit]
        for treatment in options.treatments:
            predicted = PREDICTED[by](recorded, treatment, paths)
            for unit in options.units:
                harms[unit, treatment.key] = sum(predicted[path] for path in unit)

    def harm_of(unit: Unit, choice: Choice) -> float:
        return 0.0 if choice is None else harms[unit, choice.key]

    return [options.least_harmful(limit, harm_of) for limit in limits]


def compare(
    recorded: RecordedEvaluator,
    treatments: Sequence[Treatment],
    units: Sequence[Unit],
    budgets: Sequence[float],
    criteria: Sequence[str] = (*MEASURED, *PREDICTED),
) -> dict[str, list[Measurement]]:
    """What each criterion's choice does: criterion → a measurement for each budget; arguments as ``chosen_by``.

    Of the probes' prefixes nothing is measured where they have no second token.
    """
    check_harms(criteria)
    options = Options(recorded.decoder, treatments, units)
    for budget in budgets:
        options.limit(budget)
    measured = [MEASURED[by] for by in criteria if by in MEASURED]
    if measured:
        # Once for all of them; each finds in the journal what it looks for.
        of_all = sorted({metric for harm in measured for metric in harm.metrics})
        recorded.measure([{}, *options.alone()], of_all)
    wanted = {by: chosen_by(recorded, treatments, units, budgets, by) for by in criteria}
    metrics = [each for each in _METRICS if each != "perplexity" or recorded.evaluator.probes.prefix > 1]
    return {by: recorded.measure(configurations, metrics) for by, configurations in wanted.items()}
