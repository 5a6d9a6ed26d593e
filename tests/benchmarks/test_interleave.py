import pytest

from benchmarks.disturbance import Disturbance
from benchmarks.interleave import Contender, Timing, measure, prepared


class FakeClock:
    """Time passes only where a contender says so."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def __call__(self) -> float:
        return self.now

    def contender(self, name: str, seconds: float, copies: int = 1) -> Contender:
        def call(copy: int) -> None:
            self.calls.append(f"{name}{copy}")
            self.now += seconds

        return Contender(name, tuple(lambda copy=copy: call(copy) for copy in range(copies)))


def test_everyone_is_timed_in_every_round() -> None:
    clock = FakeClock()
    timings = measure([clock.contender("a", 0.010), clock.contender("b", 0.025)], 5, 0.02, clock).timings
    assert timings["a"].rounds == pytest.approx([0.010] * 5)
    assert timings["b"].median == pytest.approx(0.025)
    assert timings["b"].times_as_long_as(timings["a"]) == pytest.approx(2.5)


def test_the_order_rotates_from_round_to_round() -> None:
    clock = FakeClock()
    measure([clock.contender(name, 1.0) for name in "abc"], 3, 0.5, clock)
    order = "".join(name[0] for name in clock.calls[6:])  # two calls each before the first round
    assert order == "abc" + "bca" + "cab"


def test_short_calls_are_repeated_and_warmed_and_the_warming_is_not_timed() -> None:
    clock = FakeClock()
    timings = measure([clock.contender("a", 0.001)], 1, 0.01, clock).timings
    assert len(clock.calls) == 2 + 1 + 10
    assert timings["a"].rounds == pytest.approx([0.001])


def test_copies_take_turns_across_rounds() -> None:
    clock = FakeClock()
    measure([clock.contender("a", 0.3, copies=3)], 4, 0.3, clock)
    first_reading, untimed = ["a0", "a1", "a2"], "a0"
    assert clock.calls == [*first_reading, untimed, "a1", "a2", "a0", "a1"]


def test_who_is_not_available_is_not_called() -> None:
    clock = FakeClock()
    missing = Contender("missing", unavailable="not installed")
    assert set(measure([clock.contender("a", 1.0), missing], 2, 0.1, clock).timings) == {"a"}
    assert measure([missing], 2).timings == {}


def test_disturbed_rounds_are_measured_again_and_left_out() -> None:
    clock = FakeClock()
    shares = iter([0.0, 0.5, 0.0, 0.0, 0.0, 0.4, 0.0, 0.01])  # asked before and after each round
    found = measure([clock.contender("a", 1.0)], 2, 0.5, clock, lambda: next(shares))
    assert found.disturbance == [0.0, 0.01]
    assert found.discarded == 2
    assert len(found.timings["a"].rounds) == 2


def test_a_machine_that_is_never_quiet_does_not_keep_us_for_ever() -> None:
    clock = FakeClock()
    found = measure([clock.contender("a", 1.0)], 3, 0.5, clock, lambda: 0.9)
    assert found.disturbance == [0.9] * 3
    assert found.discarded == 3


def test_the_share_of_others_is_a_share() -> None:
    share = Disturbance()
    assert 0.0 <= share() <= 1.0


def test_slow_spells_leave_the_ratio_alone() -> None:
    ours, peer = Timing([1.0, 5.0, 1.0, 3.0]), Timing([2.0, 10.0, 2.0, 6.0])
    assert peer.times_as_long_as(ours) == 2.0


def test_a_failing_preparation_is_a_reason() -> None:
    def fail() -> None:
        raise RuntimeError("no such engine\nmore")

    contender = prepared("peer", [fail], lambda _result, _expected: None)  # type: ignore[list-item]
    assert contender.unavailable == "RuntimeError: no such engine"
