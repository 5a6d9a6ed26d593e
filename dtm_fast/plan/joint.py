"""The joint search: for each component whether to prune, to quantize or to keep it, under a budget of size."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict

import torch

from dtm_fast.compression import Configuration, Treatment, configuration_identity
from dtm_fast.errors import InputError
from dtm_fast.measure import Measurement
from dtm_fast.model import Decoder
from dtm_fast.plan.front import front
from dtm_fast.plan.harms import (
    divergence_rate,
    divergent_tokens,
    first_divergences,
    lost_likelihood,
    shrunk,
)
from dtm_fast.plan.knapsack import Option, choose
from dtm_fast.plan.options import Choice, Options
from dtm_fast.plan.plan import Plan, Point
from dtm_fast.plan.ranking import rank
from dtm_fast.plan.recorded import RecordedEvaluator
from dtm_fast.plan.units import Unit

SEARCH = "joint"
METRICS = ("dppl", "sdt")
FINALISTS = 5
"""How many of each search are measured on the probes that confirm, for each budget."""
_HARMS = 3
"""How many harms propose a configuration for each budget (``_Search._harms``)."""
_RELUCTANCE = (0.0, 0.5, 0.8, 0.95)


def joint_search(
    recorded: RecordedEvaluator,
    treatments: Sequence[Treatment],
    units: Sequence[Unit],
    budgets: Sequence[float],
    *,
    refinements: int = 1,
    confirming: RecordedEvaluator | None = None,
) -> Plan:
    """The best configuration found for the first budget, and on the way for others: a front of size and divergence.

    1. Every unit is measured alone under every treatment.
    2. For each budget, a knapsack of the harms of single units proposes a configuration for each of three harms (rate
       of first divergence, share of divergent tokens, lost likelihood), for none of them adds up exactly. What they do
       together is measured.
    3. The best of each budget is refined: from its states (``Evaluator.rebased``) every unit is measured under the next
       smaller and the next larger of its options, so that harms are those beside all others, and the knapsack is solved
       again; once as it is, and with more and more reluctance to change.
    4. The best of many on a few probes is partly luck, and luck does not carry over: with ``confirming``, the best
       ``FINALISTS`` that each search has found are measured on other probes, and the best there is taken.

    Steps 2 and 3 are done with each kind of treatment alone, and then with all, from the best of what was found: so on
    the probes that decide, the mixture is never worse than pruning alone or int8 alone.

    Nothing is measured twice, also not by another search in the same journal.

    Args:
        recorded: measures.
        treatments: which may be chosen; keeping a unit always may.
        units: what is treated together (``plan.units``).
        budgets: effective bits of a component's weight on average, 16 being those of the model as it is; the plan is
            for the first.
        refinements: how often step 3 is done for each budget.
        confirming: measures the same model on other probes (``Probes.from_text(other_than=)``), into its own journal.

    Returns:
        A plan whose curve is the front of mean FDT over size; ``reached_by`` says what each budget reached. Both are
        of the probes that decide.

    Raises:
        InputError: a budget that cannot be reached, which names the smallest that can; no budget; no treatment; a
            number of refinements that cannot be meant; ``confirming`` is of another model or calibration, or has the
            same probes.
        ComponentError, TreatmentError: a treatment does not fit a component.
    """
    check_refinements(refinements)
    if confirming is not None:
        _check_confirming(confirming, recorded)
    options = Options(recorded.decoder, treatments, units)
    limits = [options.limit(budget) for budget in budgets]
    if not limits:
        raise InputError("budgets: at least one")
    of_kinds = [_Search(recorded, each) for each in _of_kinds(recorded.decoder, options)]
    of_all = _Search(recorded, options)
    for limit in limits:
        alone = [search.best(limit, refinements) for search in of_kinds if search.options.smallest <= limit]
        of_all.best(limit, refinements, alone)
    most = None if confirming is None else FINALISTS
    finalists = [
        {name: found for each in (*of_kinds, of_all) for name, found in each.best_within(limit, most).items()}
        for limit in limits
    ]
    deciding = {name: found for row in finalists for name, found in row.items()}
    if confirming is not None:
        configurations = [found.configuration for found in deciding.values()]
        deciding = dict(zip(deciding, confirming.measure(configurations, METRICS), strict=True))
    best = [deciding[rank({name: deciding[name] for name in row})[0]] for row in finalists]
    reached = [Point.of(recorded.decoder, found) for found in best]
    return Plan(
        configuration=dict(best[0].configuration),
        search=SEARCH,
        how={
            "treatments": [treatment.key for treatment in options.treatments],
            "budgets": list(budgets),
            "units": len(units),
            "refinements": refinements,
            "confirmed_on": None if confirming is None else len(confirming.evaluator.probes),
            "reached": [asdict(point) for point in reached],
        },
        model=recorded.model_identity,
        calibration=recorded.decoder.calibration,
        curve=front(Point.of(recorded.decoder, found) for found in deciding.values()),
        chosen=reached[0] if best[0].configuration else None,
    )


def joint_measurements(
    decoder: Decoder, options: Options, budgets: Sequence[float], refinements: int, *, confirmed: bool
) -> int:
    """About how many measurements a joint search asks for, those included that it knows already.

    At most so many but for few; fewer where several harms propose the same.
    """
    total = 0
    for each in (options, *_of_kinds(decoder, options)):
        total += 1 + len(each.units) * len(each.treatments)
        changes = len(each.units) * min(2, len(each.treatments))
        of_a_budget = _HARMS + refinements * (changes + len(_RELUCTANCE) + 1) + FINALISTS * confirmed
        total += of_a_budget * sum(each.smallest <= options.limit(budget) for budget in budgets)
    return total


def check_refinements(refinements: int) -> None:
    """Raises InputError unless so many refinements can be made."""
    if isinstance(refinements, bool) or not isinstance(refinements, int) or refinements < 0:
        raise InputError(f"refinements: a whole number of at least 0, not {refinements!r}")


def reached_by(plan: Plan) -> Mapping[float, Point]:
    """The point that a joint plan reached within each of its budgets."""
    points = [Point(**point) for point in plan.how["reached"]]
    return dict(zip(plan.how["budgets"], points, strict=True))


def _of_kinds(decoder: Decoder, options: Options) -> list[Options]:
    """The options among each kind of treatment alone; none where there is one kind."""
    kinds: dict[type[Treatment], list[Treatment]] = {}
    for each in options.treatments:
        kinds.setdefault(type(each), []).append(each)
    return [Options(decoder, kind, options.units) for kind in kinds.values() if len(kinds) > 1]


def _check_confirming(confirming: RecordedEvaluator, recorded: RecordedEvaluator) -> None:
    if confirming.model_identity != recorded.model_identity:
        raise InputError("confirming: it measures another model")
    if confirming.decoder.calibration != recorded.decoder.calibration:
        raise InputError("confirming: it measures with another calibration")
    if confirming.evaluator.probes.identity == recorded.evaluator.probes.identity:
        raise InputError("confirming: its probes are those that choose")


class _Search:
    """The search among some treatments.

    Args:
        recorded: measures.
        options: what may be chosen.
    """

    def __init__(self, recorded: RecordedEvaluator, options: Options) -> None:
        """Measures every unit alone, and the base."""
        self.options = options
        self._recorded = recorded
        self._seen: dict[str, Measurement] = {}
        base, *found = recorded.measure([{}, *options.alone()], METRICS)
        self._proposals = self._harms(base, found)

    def best(self, limit: int, refinements: int, known: Sequence[Measurement] = ()) -> Measurement:
        """The best of at most ``limit`` bits: of ``known``, of what each harm proposes, and refined so often."""
        proposed = [self.options.least_harmful(limit, harm) for harm in self._proposals]
        found = self._best_of([*(each.configuration for each in known), *proposed])
        for _ in range(refinements):
            found = self._refined(limit, found)
        return found

    def best_within(self, limit: int, most: int | None) -> dict[str, Measurement]:
        """The best, ``most`` or all, of at most ``limit`` bits that were measured, by their identities."""
        inside = {
            name: found
            for name, found in self._seen.items()
            if self.options.bits_of(found.configuration) <= limit
        }
        return {name: inside[name] for name in rank(inside)[:most]}

    def _harms(
        self, base: Measurement, alone: Sequence[Measurement]
    ) -> list[Callable[[Unit, Choice], float]]:
        """Those of single units: rate of first divergence, share of divergent tokens, lost likelihood.

        What is counted is, within each treatment, as one expects it to be (``shrunk``).
        """
        of = self.options.treatments
        by_treatment = {each.key: alone[place :: len(of)] for place, each in enumerate(of)}

        def harm(values: Mapping[str, Sequence[float]], kept: float) -> Callable[[Unit, Choice], float]:
            known = {
                (unit, key): value
                for key, row in values.items()
                for unit, value in zip(self.options.units, row, strict=True)
            }
            return lambda unit, choice: kept if choice is None else known[unit, choice.key]

        counted = [
            harm({key: shrunk([counts(each) for each in row]) for key, row in by_treatment.items()}, 0.0)
            for counts in (first_divergences, divergent_tokens)
        ]
        lost = {key: [lost_likelihood(each) for each in row] for key, row in by_treatment.items()}
        return [*counted, harm(lost, lost_likelihood(base))]

    def _refined(self, limit: int, found: Measurement) -> Measurement:
        """The best of those that harms beside ``found``'s other treatments propose, or ``found`` itself."""
        options, own = self.options, found.configuration
        rows = [options.neighbours(unit, own.get(unit[0])) for unit in options.units]
        changed = [
            _changed(own, unit, each)
            for unit, row in zip(options.units, rows, strict=True)
            for each in row[1:]
        ]
        step = self._recorded.rebased(own) if own else self._recorded
        measured = iter(step.measure(changed, ()))
        here = divergence_rate(found)
        harms = [[0.0, *(divergence_rate(next(measured)) - here for _ in row[1:])] for row in rows]
        differences = torch.tensor([abs(each) for row in harms for each in row[1:]])
        proposed = [own]
        for quantile in _RELUCTANCE if len(differences) else ():
            # A harm is added to every change: the larger it is, the fewer are made.
            extra = float(differences.quantile(quantile)) if quantile else 0.0
            weighed = [
                [
                    Option(options.bits(unit, each), harm + (extra if place else 0.0))
                    for place, (each, harm) in enumerate(zip(row, harm_row, strict=True))
                ]
                for unit, row, harm_row in zip(options.units, rows, harms, strict=True)
            ]
            picked = choose(weighed, limit)
            proposed.append(options.assembled([row[i] for row, i in zip(rows, picked, strict=True)]))
        return self._best_of(proposed)

    def _best_of(self, proposed: Iterable[Configuration]) -> Measurement:
        distinct = {configuration_identity(each): each for each in proposed}
        found = dict(zip(distinct, self._recorded.measure(distinct.values(), METRICS), strict=True))
        self._seen.update(found)
        return found[rank(found)[0]]


def _changed(configuration: Configuration, unit: Unit, choice: Choice) -> Configuration:
    changed = {path: treatment for path, treatment in configuration.items() if path not in unit}
    return changed if choice is None else changed | dict.fromkeys(unit, choice)
