"""One row of the table of a GPU: what is computed, by whom, what counts as right, and what is to be reached."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.cuda.graph_timing import Captured, medians

OURS = "dtm_fast"
_TOGETHER = 400 * 2**20  # bytes in turn: eight times the second-level cache of an H100
_MOST_COPIES = 32

Call = Callable[[], Tensor]


@dataclass
class Contest:
    """An operation on tensors of one size.

    Attributes:
        operation: its name, as backends.OPERATIONS has it.
        dtype: of the activations.
        sizes: M, N, K and so on.
        contenders: by name, the call on copy i of the inputs. OURS is the one that goals are about.
        expected: the right result for copy i.
        complaint: what is wrong with (a result, the expected one), or None.
        moved: bytes that must be read and written.
        operations: multiplications and additions.
        goals: by peer, how many times as fast OURS is to be.
        share_of_bandwidth: of the measured rate, what OURS is to reach; None: no goal.
        another: contenders that compute something else, or round otherwise: their results are not compared.
        copies: of the inputs, used in turn.
    """

    operation: str
    dtype: str
    sizes: Mapping[str, int | float]
    contenders: Mapping[str, Callable[[int], Call]]
    expected: Callable[[int], Tensor]
    complaint: Callable[[Tensor, Tensor], str | None]
    moved: int
    operations: int
    goals: Mapping[str, float] = field(default_factory=dict)
    share_of_bandwidth: float | None = None
    copies: int = 2
    another: Collection[str] = ()


Case = Callable[[], Contest]
"""Makes a contest, with its inputs, when its turn comes."""


def copies_of(size: int) -> int:
    """How many copies of inputs of so many bytes are needed, so that none is still in the cache at its next turn."""
    return min(_MOST_COPIES, max(2, -(-_TOGETHER // max(size, 1))))


def run(contest: Contest, bandwidth: float) -> dict[str, Any]:
    """Checks what each contender gives, from poisoned memory, then times them in turn."""
    captured: dict[str, Captured] = {}
    failed, wrong = {}, {}
    for name, call in contest.contenders.items():
        try:
            captured[name] = Captured([call(copy) for copy in range(contest.copies)])
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    expected = [contest.expected(copy) for copy in (0, contest.copies - 1)]
    for name, each in captured.items():
        for result in each.results:
            result.fill_(True if result.dtype == torch.bool else torch.nan)
        each.replay()
        if name in contest.another:
            continue
        for result, right in zip((each.results[0], each.results[-1]), expected, strict=True):
            complaint = contest.complaint(result, right)
            if complaint is not None:
                wrong[name] = complaint
    times: dict[str, dict[str, Any]] = medians(captured)
    for each in times.values():
        each["gbps"] = contest.moved / each["median_s"] / 1e9
        each["tops"] = contest.operations / each["median_s"] / 1e12
        each["share_of_bandwidth"] = contest.moved / each["median_s"] / bandwidth
    ours = times.get(OURS)
    speedups = {}
    if ours is not None:
        speedups = {name: each["median_s"] / ours["median_s"] for name, each in times.items() if name != OURS}
    verdicts = {
        f"{goal} x {peer}": None if peer not in speedups else speedups[peer] >= goal
        for peer, goal in contest.goals.items()
    }
    if contest.share_of_bandwidth is not None and ours is not None:
        verdicts[f"{contest.share_of_bandwidth:.0%} of the bandwidth"] = (
            ours["share_of_bandwidth"] >= contest.share_of_bandwidth
        )
    return {
        "operation": contest.operation,
        "dtype": contest.dtype,
        **contest.sizes,
        "copies": contest.copies,
        "bytes": contest.moved,
        "operations": contest.operations,
        "contenders": times,
        "speedup_vs": speedups,
        "goals": verdicts,
        "failed": failed,
        "wrong": wrong,
    }


def line(row: Mapping[str, Any]) -> str:
    """A row as text."""
    apart = (
        "operation",
        "dtype",
        "copies",
        "bytes",
        "operations",
        "contenders",
        "speedup_vs",
        "goals",
        "failed",
        "wrong",
        "at_second",
    )
    sizes = " ".join(f"{name}={value}" for name, value in row.items() if name not in apart)
    times = ", ".join(
        f"{name} {each['median_s'] * 1e6:.1f} us ({each['tops']:.0f} T, {each['share_of_bandwidth']:.0%})"
        for name, each in row["contenders"].items()
    )
    goals = ", ".join(
        f"{name}: {'yes' if met else 'NO' if met is False else '?'}" for name, met in row["goals"].items()
    )
    bad = "".join(f" FAILED {each}" for each in row["failed"].items()) + "".join(
        f" WRONG {each}" for each in row["wrong"].items()
    )
    ratios = ", ".join(f"{value:.2f} x {name}" for name, value in row["speedup_vs"].items())
    return f"{row['operation']} {row['dtype']} {sizes}: {times} | {ratios} | {goals}{bad}"
