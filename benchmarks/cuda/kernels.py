"""Every kernel of a GPU beside its peers, with the machine's measured limits."""

import gc
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.cuda import contest, divergence_cases, linear_cases
from benchmarks.cuda.graph_timing import Captured, medians

PARTS: dict[str, Callable[[bool], Iterator[contest.Case]]] = {
    "int8_linear": linear_cases.int8_contests,
    "masked_linear": linear_cases.masked_contests,
    "bitmap_linear": linear_cases.bitmap_contests,
    "token_divergence": divergence_cases.contests,
}


def bandwidths() -> dict[str, float]:
    """Bytes in a second that torch's kernels reach: reading 2 GiB for their sum, and reading and writing as much."""
    source, target = (torch.rand(2**29, device="cuda") for _ in range(2))
    calls = {"read": partial(torch.sum, source), "read and write": partial(torch.neg, source, out=target)}
    times = medians({name: Captured([call, call]) for name, call in calls.items()})
    return {name: (source.nbytes * (1 + (name != "read"))) / each["median_s"] for name, each in times.items()}


def product_limit() -> float:
    """Operations in a second of a large bfloat16 product, as torch does it."""
    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    return 2 * 8192**3 / medians({"product": Captured([partial(torch.mm, a, b)])})["product"]["median_s"]


def run(
    name: str,
    quick: bool,
    seconds: float | None,
    say: Callable[[str], None],
    keep: Callable[[dict[str, Any]], None],
) -> None:
    """One part of the table; keep is called with what is there after each row.

    Args:
        name: of PARTS.
        quick: few sizes.
        seconds: no row begins later; rows left out are counted.
        say: takes a line of text for each row.
        keep: takes the report.
    """
    began = time.perf_counter()
    torch.manual_seed(0)
    rates = bandwidths()
    limits = {f"{each} GB/s": rate / 1e9 for each, rate in rates.items()}
    limits["bfloat16 product TFLOP/s"] = product_limit() / 1e12
    say(", ".join(f"{each}: {limit:.0f}" for each, limit in limits.items()))
    rows: list[dict[str, Any]] = []
    report: dict[str, Any] = {"limits": limits, "rows": rows, "left_out": 0}
    if name == "token_divergence":
        report["certified"] = divergence_cases.certified(quick)
        say(str(report["certified"]))
        keep(report)
    for case in PARTS[name](quick):
        if seconds is not None and time.perf_counter() - began > seconds:
            report["left_out"] += 1
            continue
        rows.append(contest.run(case(), max(rates.values())))
        rows[-1]["at_second"] = round(time.perf_counter() - began, 1)
        say(contest.line(rows[-1]))
        keep(report)
        gc.collect()
        torch.cuda.empty_cache()
    if report["left_out"]:
        say(f"{report['left_out']} rows of {name} left out for want of time")
        keep(report)
