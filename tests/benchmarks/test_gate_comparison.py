"""How the gate runs and repeats, with a timer that only says what it is told."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gate import comparison
from benchmarks.gate.comparison import Comparison, Protocol, compare
from benchmarks.gate.revision import GateError
from benchmarks.gate.verdict import OK, SLOWER

Answer = Callable[[str, list[str]], dict[str, Any]]


class FakeTimer:
    """Answers as `answer` does; notes who was asked for which cases."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.asked: list[tuple[str, list[str]]] = []

    def __enter__(self) -> "FakeTimer":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __call__(self, request: dict[str, Any]) -> dict[str, Any]:
        self.asked.append((request["checkout"], request["cases"]))
        return self.answer(request["checkout"], request["cases"])


def said(others: float = 0.0, **seconds: float) -> dict[str, Any]:
    cases = {name: {"seconds": value} for name, value in seconds.items()}
    return {"isa": "avx2", "threads": 2, "without_case": [], "others": others, "cases": cases}


def compared(monkeypatch: pytest.MonkeyPatch, answer: Answer, runs: int = 3) -> tuple[Comparison, FakeTimer]:
    timer = FakeTimer(answer)
    monkeypatch.setattr(comparison, "Timer", lambda: timer)
    builds = {"base": Path("base"), "head": Path("head")}
    protocol = Protocol(runs, 0.1, None, ())
    return compare(builds, Path("results.pt"), protocol, lambda _text: None), timer


def test_the_revisions_take_turns_and_change_places(monkeypatch: pytest.MonkeyPatch) -> None:
    found, timer = compared(monkeypatch, lambda _role, _cases: said(op=1.0))
    assert [role for role, _ in timer.asked] == ["base", "head", "head", "base", "base", "head"]
    assert [row.verdict for row in found.rows] == [OK]


def test_only_what_seems_slower_is_timed_again_before_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(role: str, cases: list[str]) -> dict[str, Any]:
        times = {"fine": 1.0, "slow": 2.0 if role == "head" else 1.0}
        return said(**{name: time for name, time in times.items() if not cases or name in cases})

    found, timer = compared(monkeypatch, answer)
    assert [cases for _, cases in timer.asked] == [[]] * 6 + [["slow"]] * 6
    assert {row.name: row.verdict for row in found.rows} == {"fine": OK, "slow": SLOWER}
    assert {row.name: len(row.head) for row in found.rows} == {"fine": 3, "slow": 6}


def test_what_is_as_fast_when_timed_again_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = compared(
        monkeypatch, lambda role, cases: said(op=2.0 if role == "head" and not cases else 1.0)
    )
    assert [row.verdict for row in found.rows] == [OK]


def test_disturbed_rounds_are_measured_again_and_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A base that others slowed once would hide that head takes twice as long."""
    rounds = iter([0.0, 0.6, 0.0, 0.02] + [0.0] * 3)
    now = {"others": 0.0, "asked": 0}

    def answer(role: str, _cases: list[str]) -> dict[str, Any]:
        if now["asked"] % 2 == 0:
            now["others"] = next(rounds)
        now["asked"] += 1
        disturbed = now["others"] > 0.05
        return said(now["others"], op=9.0 if disturbed else 2.0 if role == "head" else 1.0)

    found, _ = compared(monkeypatch, answer)
    assert [row.verdict for row in found.rows] == [SLOWER]
    assert found.rows[0].base == [1.0] * 6
    assert max(found.others) == 0.02


def test_a_machine_that_is_never_quiet_does_not_keep_us_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    found, timer = compared(monkeypatch, lambda _role, _cases: said(0.9, op=1.0))
    assert len(timer.asked) == 2 * 6
    assert len(found.rows[0].base) == len(found.rows[0].head) == 3


def test_what_cannot_be_timed_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(GateError, match="base cannot be timed: no _cpu"):
        compared(monkeypatch, lambda _role, _cases: {"failed": "no _cpu"})


def test_nothing_to_compare_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(role: str, _cases: list[str]) -> dict[str, Any]:
        found = said(op=1.0)
        if role == "base":
            found["cases"]["op"] = {"missing": "no ops.op"}
        return found

    with pytest.raises(GateError, match=r"there is nothing to compare: base: no ops\.op"):
        compared(monkeypatch, answer)
