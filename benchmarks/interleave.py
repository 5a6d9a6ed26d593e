"""Timing of several contenders in one process, in rounds of rotating order.

A machine is never as quiet as one hopes. Whatever slows it for a while slows every contender of a round, so the
ratio of two times of one round is far steadier than either time, and the median over rounds steadier still.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

_MOST_REPETITIONS = 20_000
_QUIET = 0.05  # of all CPUs used by others: a tenth of a core of two is enough to make two threads wait
_LONG_CALL = 0.2  # seconds: above, a call that only warms the caches costs more than it tells


@dataclass(frozen=True)
class Contender:
    """One way to compute the case, or why there is none here."""

    name: str
    calls: tuple[Callable[[], Any], ...] = ()
    """The same call on one or several copies of the weights, used in turn."""
    complaint: Callable[[Any, Any], str | None] = lambda _result, _expected: None
    """What is wrong with (a result, the expected one), or None."""
    unavailable: str | None = None
    """Why it cannot run here."""


def prepared(
    name: str,
    preparations: Sequence[Callable[[], Callable[[], Any]]],
    complaint: Callable[[Any, Any], str | None],
) -> Contender:
    """A contender that needs preparation; where that fails, one that is not available, with the reason."""
    try:
        return Contender(name, tuple(each() for each in preparations), complaint)
    except Exception as error:
        return Contender(name, unavailable=reason_of(error))


def reason_of(error: Exception) -> str:
    """An exception as a reason for a table: its kind and the start of its first line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:150]}"


@dataclass
class Timing:
    """Seconds per call, one figure per round."""

    rounds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    def times_as_long_as(self, other: "Timing") -> float:
        """How many times longer this takes: the median of the ratios of the single rounds."""
        return statistics.median(a / b for a, b in zip(self.rounds, other.rounds, strict=True))


class _Turns:
    """Calls a contender's copies in turn, going on where the last round ended."""

    def __init__(self, calls: tuple[Callable[[], Any], ...]) -> None:
        self._calls, self._next = calls, 0

    def run(self, repetitions: int) -> None:
        calls, count, at = self._calls, len(self._calls), self._next
        for _ in range(repetitions):
            calls[at]()
            at = at + 1 if at + 1 < count else 0
        self._next = at


@dataclass
class Measurement:
    """What `measure` found, round by round."""

    timings: dict[str, Timing]
    disturbance: list[float]
    """The share of all CPUs that others used in each round kept."""
    discarded: int
    """Rounds that were measured and left out, because others disturbed them more."""


def measure(
    contenders: Sequence[Contender],
    rounds: int = 7,
    at_least: float = 0.02,
    clock: Callable[[], float] = time.perf_counter,
    disturbance: Callable[[], float] = lambda: 0.0,
) -> Measurement:
    """Time the contenders that can run: `rounds` rounds, in each of which everyone runs `at_least` seconds.

    Before the first round every copy is read once: on a virtual machine the first pass over memory that has just been
    written takes several times as long as any later one. Every turn begins with one call that is not timed, because the
    contender before has emptied the caches.
    `disturbance` tells, at the end of a round, how much others disturbed it. Disturbed rounds are measured again, at
    most as many as were asked for, and the quietest are kept: chosen by what others did, never by our own times.
    """
    running = [each for each in contenders if each.unavailable is None]
    if not running:
        return Measurement({}, [], 0)
    turns = {each.name: _Turns(each.calls) for each in running}
    repetitions, warming = {}, {}
    for each in running:
        turns[each.name].run(len(each.calls))
        start = clock()
        turns[each.name].run(1)
        seconds = max(clock() - start, 1e-9)
        repetitions[each.name] = min(max(1, math.ceil(at_least / seconds)), _MOST_REPETITIONS)
        warming[each.name] = seconds < _LONG_CALL
    measured: list[tuple[float, dict[str, float]]] = []
    quiet = 0
    while quiet < rounds and len(measured) < 2 * rounds:
        shift = len(measured) % len(running)
        times = {}
        disturbance()
        for each in running[shift:] + running[:shift]:
            turn, count = turns[each.name], repetitions[each.name]
            if warming[each.name]:
                turn.run(1)
            start = clock()
            turn.run(count)
            times[each.name] = (clock() - start) / count
        measured.append((disturbance(), times))
        quiet += measured[-1][0] <= _QUIET
    kept = sorted(measured, key=lambda each: each[0])[:rounds]
    return Measurement(
        {each.name: Timing([times[each.name] for _, times in kept]) for each in running},
        [share for share, _ in kept],
        len(measured) - len(kept),
    )
