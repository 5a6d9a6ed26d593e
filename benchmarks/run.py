"""python -m benchmarks.run: every row beside its peers, as JSON, as docs/performance.md and as pictures.

Exit code 0 also where goals are missed (that is what the table is for), 1 where a result of ours is wrong.
"""

import argparse
import gc
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import (
    certified_divergence_cases,
    figures,
    int8_linear_cases,
    machine,
    masked_linear_cases,
    sections,
    sparse_linear_cases,
    table,
    token_divergence_cases,
)
from benchmarks.case import OURS, SHORT_DTYPE, Case, Result, checked
from benchmarks.disturbance import Disturbance, wait_until_quiet
from benchmarks.goals import Verdict, judge, judge_mean
from benchmarks.interleave import measure
from benchmarks.limits import Limits, Probe

RESULTS = machine.ROOT / "benchmarks" / "results"
DOCS = machine.ROOT / "docs"
OPERATIONS: dict[str, Callable[[bool], list[Case]]] = {
    "int8_linear": lambda quick: int8_linear_cases.cases(compiled=not quick),
    "masked_linear": lambda _quick: masked_linear_cases.cases(),
    "sparse_linear": lambda _quick: sparse_linear_cases.cases(),
    "token_divergence": lambda quick: token_divergence_cases.cases(large=not quick),
    "certified token_divergence": lambda quick: certified_divergence_cases.cases(
        certified_divergence_cases.QUICK_EVERY if quick else 1
    ),
}


def run_case(case: Case, rounds: int, at_least: float) -> Result:
    """Build, check and time one row."""
    contest = case.build(case)
    good, unavailable, wrong = checked(contest)
    result = Result(case, unavailable=unavailable, wrong=wrong)
    measured = measure(good, rounds, at_least, disturbance=Disturbance())
    result.timings, result.disturbance, result.discarded = (
        measured.timings,
        measured.disturbance,
        measured.discarded,
    )
    if case.extra is not None:
        result.extra = case.extra(case)
    return result


def verdicts(results: Sequence[Result], limits: Limits) -> list[Verdict]:
    """The verdict on every goal of the rows that ran, then on the means over them."""
    ran = {each.case.operation for each in results}
    single = [
        judge(goal, each, limits) for each in results for goal in each.case.goals if goal.applies(limits)
    ]
    means = [judge_mean(goal, results) for goal in int8_linear_cases.MEAN_GOALS if goal.operation in ran]
    return single + means


def row_json(result: Result, limits: Limits) -> dict[str, Any]:
    """A row as JSON: what benchmarks.table and benchmarks.figures read."""
    case = result.case
    rate, bandwidth = result.rate(), result.bandwidth()
    roof = limits.roof(case.arithmetic, case.flops, case.bytes)
    return {
        "op": case.operation,
        "name": case.name,
        "M": case.M,
        "N": case.N,
        "K": case.K,
        "dtype": SHORT_DTYPE[case.dtype],
        "n_variants": case.variants,
        "sparsity": case.sparsity,
        "note": case.note,
        "flops": case.flops,
        "bytes": case.bytes,
        "arithmetic": case.arithmetic,
        "gflops": rate,
        "gbps": bandwidth,
        "roof": roof,
        "share_of_roof": rate / roof if rate is not None and roof is not None else None,
        "contenders": {
            name: {"median_s": timing.median, "rounds_s": timing.rounds, "gflops": result.rate(name)}
            for name, timing in result.timings.items()
        },
        "speedup_vs": {name: result.speed_ratio(name) for name in result.timings if name != OURS},
        "not_available": result.unavailable,
        "wrong": result.wrong,
        "extra": result.extra,
        "disturbance": result.disturbance,
        "rounds_discarded": result.discarded,
    }


def report_json(
    about: dict[str, Any], results: Sequence[Result], limits: Limits, quick: bool, whole: bool
) -> dict[str, Any]:
    return {
        "machine": about,
        "quick": quick,
        "whole": whole,
        "limits": limits.as_json(),
        "rows": [row_json(each, limits) for each in results],
        "verdicts": [vars(each) for each in verdicts(results, limits)],
    }


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="few rounds; without torch.compile and the large head"
    )
    parser.add_argument(
        "--only", action="append", choices=list(OPERATIONS), help="only this operation; may be repeated"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--patience",
        type=float,
        default=30.0,
        help="seconds to wait at most for a quiet machine, before each row",
    )
    parser.add_argument("--rounds", type=int, help="rounds per row (7; 3 with --quick)")
    parser.add_argument(
        "--write-docs",
        action="store_true",
        help="write docs/performance.md after a partial run too (a whole run always does)",
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="the folder of the JSON file")
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> int:
    options = arguments(given)
    torch.set_num_threads(options.threads)
    about = machine.describe()
    chosen = options.only or list(OPERATIONS)
    rounds, at_least = options.rounds or (3 if options.quick else 7), 0.01 if options.quick else 0.05
    probe = Probe()
    probe.again(3)
    results: list[Result] = []
    for operation in chosen:
        for case in OPERATIONS[operation](options.quick):
            wait_until_quiet(options.patience)
            results.append(run_case(case, rounds, at_least))
            print(table.progress(row_json(results[-1], probe.again())), flush=True)
            gc.collect()  # the next row's copies need the room
    whole = set(chosen) == set(OPERATIONS)
    about["load_average_at_end"] = [round(each, 2) for each in os.getloadavg()]
    about["rounds"] = rounds
    report = report_json(about, results, probe.again(3), options.quick, whole)
    options.output.mkdir(parents=True, exist_ok=True)
    partial = "" if whole else "-" + "-".join(chosen)
    name = f"{machine.slug(about)}-{about['date'][:10]}{partial}{'-quick' if options.quick else ''}.json"
    (options.output / name).write_text(json.dumps(report, indent=1) + "\n")
    text = table.page(report, name)
    print(text)
    if options.write_docs or (whole and not options.quick):
        page = DOCS / "performance.md"
        known = sections.kept(page.read_text()) if page.exists() else ""
        page.write_text(f"{text}\n{known}\n" if known else text)
        figures.roofline(report, DOCS / "performance-roofline.png")
        figures.bars(report, DOCS / "performance-bars.png")
    return 1 if any(OURS in each.wrong for each in results) else 0


if __name__ == "__main__":
    raise SystemExit(main())
