"""What the kernels should reach, and whether they do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from benchmarks.case import Result
    from benchmarks.limits import Limits

Kind = Literal["speed", "time", "share", "extra"]
REACHED, NOT_REACHED = "reached", "NOT reached"


@dataclass(frozen=True)
class Goal:
    """A bound on one measured figure of one row.

    kind "speed": how many times as fast as the fastest of `against` we are.
    kind "time": our time divided by the time of the fastest of `against`.
    kind "share": our rate divided by the limit `against[0]`.
    kind "extra": the further measurement `against[0]` itself.
    """

    text: str
    kind: Kind
    against: tuple[str, ...]
    bound: float
    at_least: bool = True
    if_available: bool = False
    """Only for machines that have the limit: elsewhere there is no verdict at all."""

    def applies(self, limits: Limits) -> bool:
        return not self.if_available or all(name in limits.best for name in self.against)


@dataclass(frozen=True)
class GeometricMeanGoal:
    """A bound on the geometric mean, over the rows of an operation, of how many times as fast we are."""

    text: str
    operation: str
    against: str
    bound: float


@dataclass(frozen=True)
class Verdict:
    row: str
    goal: str
    measured: float | None
    verdict: str
    others: float = 0.0
    """The share of the CPUs that other processes used in the row's median round; over rows, the highest."""


def judge(goal: Goal, result: Result, limits: Limits) -> Verdict:
    """The verdict on one goal of one row. What could not be measured is said, never taken for reached."""
    if "dtm_fast" in result.wrong:
        return Verdict(result.case.name, goal.text, None, f"{NOT_REACHED}: {result.wrong['dtm_fast']}")
    measured, reason = _measured(goal, result, limits)
    if measured is None:
        return Verdict(result.case.name, goal.text, None, f"not measured: {reason}")
    return Verdict(
        result.case.name, goal.text, measured, _compare(measured, goal.bound, goal.at_least), result.others
    )


def judge_mean(goal: GeometricMeanGoal, results: Sequence[Result]) -> Verdict:
    """The verdict on a geometric mean; rows that lack the peer are counted and said."""
    rows = [each for each in results if each.case.operation == goal.operation and each.case.variants == 1]
    ratios = [ratio for each in rows if (ratio := each.speed_ratio(goal.against)) is not None]
    name = f"{goal.operation}, {len(ratios)} of {len(rows)} rows"
    if not ratios:
        return Verdict(name, goal.text, None, f"not measured: no row has {goal.against}")
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    others = max(each.others for each in rows)
    return Verdict(name, goal.text, mean, _compare(mean, goal.bound, True), others)


def _compare(measured: float, bound: float, at_least: bool) -> str:
    reached = measured >= bound if at_least else measured <= bound
    return REACHED if reached and math.isfinite(measured) else NOT_REACHED


def _measured(goal: Goal, result: Result, limits: Limits) -> tuple[float | None, str]:
    if goal.kind == "extra":
        value = result.extra.get(goal.against[0], "left out")
        return (None, value) if isinstance(value, str) else (value, "")
    if result.ours is None:
        return None, result.unavailable.get("dtm_fast", "dtm_fast did not run")
    if goal.kind == "share":
        limit = goal.against[0]
        if limit not in limits.best:
            return None, f"limit {limit}: {limits.unavailable.get(limit, 'not measured')}"
        rate = result.bandwidth() if limit == "read" else result.rate()
        assert rate is not None
        return rate / limits.best[limit], ""
    ratios = [ratio for peer in goal.against if (ratio := result.speed_ratio(peer)) is not None]
    if not ratios:
        reasons = [
            f"{peer}: {(result.unavailable | result.wrong).get(peer, 'not in this row')}"
            for peer in goal.against
        ]
        return None, "; ".join(reasons)
    speed = min(ratios)
    return (speed if goal.kind == "speed" else 1 / speed), ""
