import dataclasses

import pytest
import torch

from benchmarks.case import Case, Result
from benchmarks.goals import GeometricMeanGoal, Goal, judge, judge_mean
from benchmarks.interleave import Timing
from benchmarks.limits import Limits

LIMITS = Limits(2, best={"int8_vnni": 1000.0, "read": 30.0}, unavailable={"bf16_dot": "no such instruction"})


def result(**seconds: float) -> Result:
    case = Case("op", 2, 3, 4, torch.float32, build=None, flops=1e12, bytes=1e9, arithmetic=("int8_vnni",))  # type: ignore[arg-type]
    return Result(case, {name: Timing([value] * 3) for name, value in seconds.items()})


def verdict(goal: Goal, measured: Result) -> tuple[float | None, str]:
    found = judge(goal, measured, LIMITS)
    return found.measured, found.verdict


def test_speed_is_against_the_fastest_peer() -> None:
    measured = result(dtm_fast=1.0, slow=4.0, fast=1.5)
    assert verdict(Goal("", "speed", ("slow", "fast"), 1.5), measured) == (1.5, "reached")
    assert verdict(Goal("", "speed", ("slow", "fast"), 1.6), measured) == (1.5, "NOT reached")


def test_time_is_a_bound_from_above() -> None:
    measured = result(dtm_fast=1.2, dense=1.0)
    assert verdict(Goal("", "time", ("dense",), 1.15, at_least=False), measured)[1] == "NOT reached"
    assert verdict(Goal("", "time", ("dense",), 1.25, at_least=False), measured)[1] == "reached"


def test_shares_of_limits() -> None:
    measured = result(dtm_fast=0.05)  # 20,000 GOP/s of 1,000; 20 GB/s of 30
    assert verdict(Goal("", "share", ("int8_vnni",), 0.7), measured) == (pytest.approx(20.0), "reached")
    assert verdict(Goal("", "share", ("read",), 0.85), measured) == (pytest.approx(2 / 3), "NOT reached")
    found = judge(Goal("", "share", ("bf16_dot",), 0.7), measured, LIMITS)
    assert found.verdict == "not measured: limit bf16_dot: no such instruction"
    assert not Goal("", "share", ("bf16_dot",), 0.7, if_available=True).applies(LIMITS)


def test_what_was_not_measured_is_never_reached() -> None:
    goal = Goal("", "speed", ("FBGEMM",), 0.0)
    without = result(dtm_fast=1.0)
    without.unavailable["FBGEMM"] = "no engine"
    assert verdict(goal, without) == (None, "not measured: FBGEMM: no engine")
    not_run = result(FBGEMM=1.0)
    not_run.unavailable["dtm_fast"] = "RuntimeError: broken"
    assert verdict(goal, not_run) == (None, "not measured: RuntimeError: broken")


def test_a_wrong_result_of_ours_reaches_nothing() -> None:
    wrong = result(FBGEMM=1.0)
    wrong.wrong["dtm_fast"] = "wrong result: bits"
    assert verdict(Goal("", "speed", ("FBGEMM",), 0.0), wrong) == (None, "NOT reached: wrong result: bits")


def test_further_measurements() -> None:
    goal = Goal("", "extra", ("peak_extra_mib",), 64.0, at_least=False)
    measured = result(dtm_fast=1.0)
    assert verdict(goal, measured) == (None, "not measured: left out")
    measured.extra["peak_extra_mib"] = "the child process failed"
    assert verdict(goal, measured) == (None, "not measured: the child process failed")
    measured.extra["peak_extra_mib"] = 65.0
    assert verdict(goal, measured) == (65.0, "NOT reached")


def test_geometric_mean_counts_the_rows_without_the_peer() -> None:
    rows = [result(dtm_fast=1.0, peer=4.0), result(dtm_fast=1.0, peer=1.0), result(dtm_fast=1.0)]
    goal = GeometricMeanGoal("≥ 2", "op", "peer", 2.0)
    found = judge_mean(goal, rows)
    assert (found.row, found.measured, found.verdict) == ("op, 2 of 3 rows", pytest.approx(2.0), "reached")
    assert judge_mean(dataclasses.replace(goal, bound=2.1), rows).verdict == "NOT reached"
    assert judge_mean(dataclasses.replace(goal, against="no one"), rows).verdict.startswith("not measured")


def test_roof() -> None:
    assert LIMITS.roof(("int8_vnni",), 1e12, 1e9) == 1000.0
    assert LIMITS.roof(("int8_vnni",), 1e9, 1e9) == 30.0
    assert LIMITS.roof(("bf16_dot",), 1e9, 1e9) is None
