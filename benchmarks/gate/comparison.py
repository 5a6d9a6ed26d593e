"""Two built revisions, timed in turns."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.gate import timing_child
from benchmarks.gate.revision import GateError
from benchmarks.gate.verdict import SLOWER, Row

ROOT = Path(__file__).resolve().parents[2]
_QUIET = 0.05  # of all CPUs used by others, as in benchmarks.interleave


@dataclass(frozen=True)
class Protocol:
    """What is run, and how often."""

    runs: int
    """Of each revision."""
    seconds: float
    """That a case is timed for in a run; the fastest sample counts."""
    threads: int | None
    operations: Sequence[str]
    """None named: all."""


class Timer:
    """The process that forks one process per run: see timing_child."""

    def __enter__(self) -> "Timer":
        # A group of its own, so that it can be ended with all that it forked.
        self._process = subprocess.Popen(
            [sys.executable, "-m", timing_child.__name__],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()

    def __call__(self, request: Mapping[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        said: dict[str, Any] = json.loads(line) if line else {"failed": "the process that times them ended"}
        return said


class Comparison:
    """The rows of two built revisions, filled round by round."""

    def __init__(self, builds: Mapping[str, Path], results: Path, protocol: Protocol) -> None:
        self._builds = builds
        self._results = results
        self._protocol = protocol
        self._rows: dict[str, Row] = {}
        self.others: list[float] = []
        """The share of the CPUs that others used in each round kept."""
        self.about: dict[str, dict[str, Any]] = {}
        """By role: instruction set, threads, operations that no case times."""

    @property
    def rows(self) -> list[Row]:
        return list(self._rows.values())

    def run(self, timer: Timer, say: Callable[[str], None], cases: Sequence[str] = ()) -> None:
        """Time both revisions in turns; all cases, or those named.

        Rounds that others disturb are measured again, at most as many as were asked for, and the quietest are kept:
        chosen by what others did, never by the times. A disturbed run of the base would hide every regression.
        """
        runs = self._protocol.runs
        measured: list[tuple[float, dict[str, Any]]] = []
        quiet = 0
        while quiet < runs and len(measured) < 2 * runs:
            start = time.monotonic()
            # Whoever is second finds the machine warmer, so they change places. The very first writes the results
            # that the others are compared with, so it must be the base.
            order = ("base", "head") if len(measured) % 2 == 0 else ("head", "base")
            said = {role: self._one_run(timer, role, cases) for role in order}
            others = max(each["others"] for each in said.values())
            measured.append((others, said))
            quiet += others <= _QUIET
            again = f", {len(cases)} cases again" if cases else ""
            disturbed = f", disturbed: others used {others:.0%} of the CPUs" if others > _QUIET else ""
            say(f"round {len(measured)}{again}: {time.monotonic() - start:.0f} s{disturbed}")
        for others, said in sorted(measured, key=lambda each: each[0])[:runs]:
            self.others.append(others)
            for role in ("base", "head"):
                for name, found in said[role]["cases"].items():
                    self._rows.setdefault(name, Row(name)).add(role, found)
                self.about[role] = {key: said[role][key] for key in ("isa", "threads", "without_case")}

    def _one_run(self, timer: Timer, role: str, cases: Sequence[str]) -> dict[str, Any]:
        said = timer(
            {
                "checkout": str(self._builds[role]),
                "results": str(self._results),
                "seconds": self._protocol.seconds,
                "threads": self._protocol.threads,
                "operations": list(self._protocol.operations),
                "cases": list(cases),
            }
        )
        if "failed" in said:
            raise GateError(f"{role} cannot be timed: {said['failed']}")
        return said


def compare(
    builds: Mapping[str, Path], results: Path, protocol: Protocol, say: Callable[[str], None]
) -> Comparison:
    """Time the revisions "base" and "head", and the cases that seem slower as often again.

    `results` is a file to be made; `say` is told how far things are.
    """
    comparison = Comparison(builds, results, protocol)
    with Timer() as timer:
        comparison.run(timer, say)
        suspects = [row.name for row in comparison.rows if row.verdict == SLOWER]
        if suspects:
            comparison.run(timer, say, suspects)
    if all(row.ratio is None and not row.fails for row in comparison.rows):
        reasons = sorted({row.remark for row in comparison.rows})
        raise GateError(f"there is nothing to compare: {'; '.join(reasons)}")
    return comparison
