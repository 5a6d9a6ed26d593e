"""Pruning in rounds: in each, how much of every component FDT allows to prune next."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dtm_fast.compression import Configuration, Prune
from dtm_fast.errors import InputError, TreatmentError
from dtm_fast.measure.racing import fdt75
from dtm_fast.model import Decoder
from dtm_fast.plan.allocation import Curve, allocate
from dtm_fast.plan.plan import Plan, Point
from dtm_fast.plan.recorded import RecordedEvaluator

SEARCH = "pruning rounds"
METRICS = ("dppl", "sdt")
PAPER_STEPS = (0.20, 0.15, 0.10, 0.10, 0.05, 0.05, 0.05, 0.05)
"""What each round adds to the mean sparsity: 75% after eight."""


@dataclass(frozen=True)
class Round:
    """One round: what was measured, and how sparse each component is to be.

    Attributes:
        step: mean sparsity that the round was to add.
        current: component → its sparsity before.
        points: component → [added sparsity, FDT_75] as measured, the others at their current sparsity; ``Curve`` makes
            them monotone.
        level: the least FDT_75 that any component's curve has at what it gets, before that is rounded to whole weights.
            Each is beside the others' current sparsity: what all changes do together is worse.
        sparsities: component → its sparsity after.
    """

    step: float
    current: dict[str, float]
    points: dict[str, list[list[float]]]
    level: float
    sparsities: dict[str, float]

    @property
    def configuration(self) -> dict[str, Prune]:
        """The components that are pruned after the round, each under the ``Prune`` of its sparsity."""
        return _configuration(self.sparsities)

    def to_json(self) -> dict[str, Any]:
        """Its attributes."""
        return asdict(self)


def check_steps(steps: Sequence[float]) -> None:
    """Raises InputError unless ``steps`` can be what rounds add: each above 0, and all together no more than 1."""
    if not steps:
        raise InputError("steps: at least one")
    for step in steps:
        if not step > 0:
            raise InputError(f"steps: each must be above 0, not {step:g}")
    # Steps such as three thirds may add up to a little more than 1.
    if not math.fsum(steps) <= 1 + 1e-9:
        raise InputError(f"steps: they may add up to 1, not to {math.fsum(steps):g}")


def probe_round(
    recorded: RecordedEvaluator, current: Mapping[str, float], step: float, reached: float | None = None
) -> Round:
    """One round on the model as it is: measures every component's curve, and allocates ``step`` by max-min.

    Each component alone gets 0, ½ and 1½ ``step`` more, and 100% in all (what would be beyond that is left out), all
    others staying as they are; FDT alone is measured, from the states of the current configuration where the evaluator
    can (``RecordedEvaluator.rebased``).

    ``Prune`` drops whole weights, so what is allocated is rounded to whole weights: ``round(step * all weights)`` in
    all, those that are lost by rounding down going to the largest remainders. So the budget is met to half a weight of
    the whole model. Each sparsity is then the number with the fewest decimals by which ``Prune`` drops so many.

    Args:
        recorded: measures; of any model, also one that was trained since the last round.
        current: component → its sparsity in that model, 0 where it names none; a ``Round``'s ``sparsities``.
        step: share of all components' weights to drop in addition.
        reached: what is dropped after this round if that is not exactly ``step`` more, so that rounding does not add
            up over rounds.

    Raises:
        InputError: step is not above 0, or there is not so much left.
        ComponentError, TreatmentError: current names no component, or no sparsity.

    Source: Deiseroth et al. 2023 (papers.md §1.5).
    """
    check_steps([step])
    dropped = _dropped(recorded.decoder, current)
    total = sum(_sizes(recorded.decoder).values())
    left = total - sum(dropped.values())
    wanted = round(step * total) if reached is None else round(reached * total) - sum(dropped.values())
    if wanted > left:
        raise InputError(f"step: {step:g} cannot be added; {left / total:g} of the weights are left")
    return _round(recorded, dropped, step, wanted)


def prune_in_rounds(
    recorded: RecordedEvaluator, steps: Sequence[float] = PAPER_STEPS, *, beside_uniform: bool = False
) -> Plan:
    """Prunes the model round after round, without training between them, to a mean sparsity of ``sum(steps)``.

    Each round is a ``probe_round`` from what the last one chose, on the same weights: a weight that was dropped stays
    so, for masks of rising sparsity are nested. After round r ``round(sum(steps[:r]) * all weights)`` are dropped, so
    that rounding does not add up over rounds.

    Args:
        recorded: measures; what is in the journal is not measured again.
        steps: mean sparsity that each round adds.
        beside_uniform: whether to measure what the same mean sparsities do uniformly, too.

    Returns:
        A plan whose curve has the joint configuration after each round, the last of which is chosen; ``how["rounds"]``
        has each ``Round``, and ``how["uniform"]``, if that was asked for, a ``Point`` for each.

    Raises:
        InputError: no steps, one that is not above 0, or more than 1 in all.

    Source: Deiseroth et al. 2023 (papers.md §1.5, §1.6), whose rounds have recovery training between them.
    """
    check_steps(steps)
    sizes = _sizes(recorded.decoder)
    dropped = dict.fromkeys(sizes, 0)
    total = sum(sizes.values())
    rounds: list[Round] = []
    curve: list[Point] = []
    baseline: list[Point] = []
    for number, step in enumerate(steps, 1):
        target = round(min(1.0, math.fsum(steps[:number])) * total)
        rounds.append(_round(recorded, dropped, step, target - sum(dropped.values())))
        dropped = _dropped(recorded.decoder, rounds[-1].sparsities)
        (joint,) = recorded.measure([rounds[-1].configuration], METRICS)
        curve.append(Point.of(recorded.decoder, joint))
        if beside_uniform:
            same = _configuration(dict.fromkeys(sizes, _sparsity(target, total)))
            (found,) = recorded.measure([same], METRICS)
            baseline.append(Point.of(recorded.decoder, found))
    configuration = rounds[-1].configuration
    how: dict[str, Any] = {"steps": list(steps), "rounds": [each.to_json() for each in rounds]}
    if beside_uniform:
        how["uniform"] = [asdict(point) for point in baseline]
    return Plan(
        configuration=dict(configuration),
        search=SEARCH,
        how=how,
        model=recorded.model_identity,
        curve=curve,
        chosen=curve[-1] if configuration else None,
    )


def uniform(decoder: Decoder, sparsity: float) -> dict[str, Prune]:
    """Every component at the same sparsity: what the allocation is to be compared with, of the same mean.

    Raises:
        TreatmentError: it lies outside [0, 1].

    Source: Deiseroth et al. 2023 (papers.md §1.6), "uniform magnitude".
    """
    return dict.fromkeys(decoder.components, Prune(sparsity))


def _round(recorded: RecordedEvaluator, dropped: Mapping[str, int], step: float, wanted: int) -> Round:
    """The round that drops ``wanted`` weights more."""
    sizes = _sizes(recorded.decoder)
    left = {path: sizes[path] - count for path, count in dropped.items()}
    current = {path: _sparsity(count, sizes[path]) for path, count in dropped.items()}
    configuration = _configuration(current)
    probed = {path: _probed(sizes[path], left[path], step) for path in sizes}
    alone: list[Configuration] = [
        {**configuration, path: Prune(_sparsity(dropped[path] + count, sizes[path]))}
        for path, counts in probed.items()
        for count in counts
    ]
    here = recorded.rebased(configuration) if configuration else recorded
    base, *found = (fdt75(each.fdt) for each in here.measure([configuration, *alone], ()))
    rest = iter(found)
    points = {
        path: [[0.0, base], *([count / sizes[path], next(rest)] for count in counts)]
        for path, counts in probed.items()
    }
    curves = {path: Curve(tuple((added, value) for added, value in each)) for path, each in points.items()}
    allocated = allocate(curves, sizes, wanted / sum(sizes.values()))
    shares = {path: added * sizes[path] for path, added in allocated.sparsities.items()}
    more = _whole(shares, left, wanted)
    sparsities = {path: _sparsity(count + more[path], sizes[path]) for path, count in dropped.items()}
    return Round(step, current, points, allocated.level, sparsities)


def _probed(size: int, left: int, step: float) -> list[int]:
    """Numbers of weights, rising, that a component is probed with beyond 0."""
    counts = (round(step / 2 * size), round(3 * step / 2 * size), left)
    return sorted({min(count, left) for count in counts} - {0})


def _whole(shares: Mapping[str, float], most: Mapping[str, int], total: int) -> dict[str, int]:
    """The shares of ``total`` as integers, none above ``most``; the largest remainders get what rounding down loses."""
    whole = {path: min(math.floor(share), most[path]) for path, share in shares.items()}
    open_to_more = [path for path in whole if whole[path] < most[path]]
    open_to_more.sort(key=lambda path: whole[path] - shares[path])
    for path in open_to_more[: total - sum(whole.values())]:
        whole[path] += 1
    return whole


def _sparsity(dropped: int, size: int) -> float:
    """The number with the fewest decimals by which ``Prune`` drops so many of ``size`` weights."""
    candidates = (round(dropped / size, decimals) for decimals in range(18))
    return next(each for each in candidates if round(each * size) == dropped)


def _configuration(sparsities: Mapping[str, float]) -> dict[str, Prune]:
    return {path: Prune(sparsity) for path, sparsity in sparsities.items() if sparsity > 0}


def _sizes(decoder: Decoder) -> dict[str, int]:
    return {path: component.numel for path, component in decoder.components.items()}


def _dropped(decoder: Decoder, sparsities: Mapping[str, float]) -> dict[str, int]:
    """The number of weights that each component's ``Prune`` drops, after checking that it can."""
    for path, sparsity in sparsities.items():
        decoder.component(path)
        try:
            Prune(sparsity)
        except TreatmentError as error:
            raise TreatmentError(f"{path}: {error}") from None
    return {path: round(sparsities.get(path, 0) * size) for path, size in _sizes(decoder).items()}
