"""A row of the table: one operation on one shape, with everyone who can compute it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from benchmarks.goals import Goal
from benchmarks.interleave import Contender, Timing, reason_of

OURS = "dtm_fast"
SHORT_DTYPE = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
# A virtual machine may report the cache of the whole host (480 MB seen): copies of the weights in turn, together
# larger than that, are out of cache whatever its share really is.
OUT_OF_CACHE_BYTES = 2**30


@dataclass(frozen=True)
class Contest:
    """What a case builds: the contenders, ours first, and the twin's result."""

    contenders: list[Contender]
    expected: Any


@dataclass(frozen=True)
class Case:
    operation: str
    M: int
    K: int
    N: int
    dtype: torch.dtype
    build: Callable[[Case], Contest]
    flops: float
    """Operations of the dense product(s), a multiplication and an addition counting as two."""
    bytes: float
    """What must at least be read and written."""
    arithmetic: tuple[str, ...]
    """The names of the limits of arithmetic that could compute it (limits.INSTRUCTIONS)."""
    goals: tuple[Goal, ...] = ()
    variants: int = 1
    sparsity: float = 0.0
    note: str = ""
    out_of_cache: int = 0
    """Copies of the weights to use in turn until they fill so many bytes; 0 for one copy."""
    extra: Callable[[Case], dict[str, float | str]] | None = None
    """Further measurements; a string says why there is none."""

    @property
    def label(self) -> str:
        return f"({self.M}, {self.K}, {self.N})" + (f" {self.note}" if self.note else "")

    @property
    def name(self) -> str:
        return f"{self.operation} {self.label} {SHORT_DTYPE[self.dtype]}"

    def copies(self, weight_bytes: int) -> int:
        """How many copies of weights of this size to use in turn."""
        return max(1, math.ceil(self.out_of_cache / max(weight_bytes, 1)))

    def shrunk(self) -> Case:
        """The same on a small shape with tails, for a quick check of correctness."""
        return replace(
            self,
            M=min(self.M, 33),
            K=min(self.K, 100),
            N=min(self.N, 123),
            out_of_cache=0,
            goals=(),
            extra=None,
        )


@dataclass
class Result:
    """What a case measured."""

    case: Case
    timings: dict[str, Timing] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)
    """Everyone who was not timed, and why; also a wrong result is a reason."""
    wrong: dict[str, str] = field(default_factory=dict)
    extra: dict[str, float | str] = field(default_factory=dict)
    disturbance: list[float] = field(default_factory=list)
    discarded: int = 0

    @property
    def others(self) -> float:
        """The share of the CPUs that other processes used in the median round."""
        return statistics.median(self.disturbance) if self.disturbance else 0.0

    @property
    def ours(self) -> Timing | None:
        return self.timings.get(OURS)

    def speed_ratio(self, peer: str) -> float | None:
        """How many times as fast as the peer we are."""
        if self.ours is None or peer not in self.timings:
            return None
        return self.timings[peer].times_as_long_as(self.ours)

    def rate(self, name: str = OURS) -> float | None:
        """Operations per second, in 1e9."""
        return self.case.flops / self.timings[name].median / 1e9 if name in self.timings else None

    def bandwidth(self, name: str = OURS) -> float | None:
        """Bytes per second, in 1e9, of those that must move."""
        return self.case.bytes / self.timings[name].median / 1e9 if name in self.timings else None


def checked(contest: Contest) -> tuple[list[Contender], dict[str, str], dict[str, str]]:
    """(who runs and is right, who does not run and why, who is wrong and how).

    Every contender runs once here, so an exception in one is a reason, and not the end of the benchmark.
    """
    good, unavailable, wrong = [], {}, {}
    for each in contest.contenders:
        if each.unavailable is not None:
            unavailable[each.name] = each.unavailable
            continue
        try:
            complaint = each.complaint(each.calls[0](), contest.expected)
        except Exception as error:
            unavailable[each.name] = reason_of(error)
            continue
        if complaint is None:
            good.append(each)
        else:
            wrong[each.name] = f"wrong result: {complaint}"
    return good, unavailable, wrong
