"""python -m benchmarks.cuda.page RESULT.json: the section of docs/performance.md on a GPU, from what was measured."""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cuda.contest import OURS
from benchmarks.cuda.seven_billion import EVALUATIONS, GOALS, PAPER_PROBES
from benchmarks.sections import GPU

PAGE = Path("docs/performance.md")
VERDICTS = {True: "reached", False: "**not reached**", None: "no figure"}
KINDS = {
    "peaked": "random weights, margins like a trained model's",
    "plain": "random weights as they are made",
}


def size_of(row: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name} {row[name]:,}" for name in "MTNKDV" if name in row and not (name == "V" and row[name] == 1)
    )


def time_of(contender: Mapping[str, Any] | None) -> str:
    return "" if contender is None else f"{contender['median_s'] * 1e6:,.1f} µs"


def kernel_rows(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A table of one operation: our time and share of the limits, each peer with the ratio, and the goals."""
    names: list[str] = []
    for row in rows:
        names += [name for name in row["contenders"] if name != OURS and name not in names]
    several_runs = any("run" in row for row in rows)
    heads = ["size", "ours", "of the bandwidth", "TOP/s", *names, "goals", *(["run"] if several_runs else [])]
    text = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in rows:
        ours = row["contenders"].get(OURS)
        size = size_of(row) + (f", density {row['density']}" if "density" in row else "")
        peers = []
        for name in names:
            other = row["contenders"].get(name)
            ratio = f" ({row['speedup_vs'][name]:.2f} ×)" if name in row["speedup_vs"] else ""
            peers.append(f"{time_of(other)}{ratio}" + (" wrong" if name in row["wrong"] else ""))
        goals = "; ".join(f"{goal}: {VERDICTS[met]}" for goal, met in row["goals"].items())
        share = "" if ours is None else f"{ours['share_of_bandwidth']:.0%}"
        rate = "" if ours is None else f"{ours['tops']:,.0f}"
        run = [str(row.get("run", ""))] if several_runs else []
        text.append("| " + " | ".join([size, time_of(ours), share, rate, *peers, goals, *run]) + " |")
    return text


def certified_line(found: Mapping[str, Any]) -> str:
    full, proved = (found["seconds"][name] * 1e3 for name in ("full", "certified"))
    settled = ", ".join(f"{count:,} by {stage}" for stage, count in found["settled"].items() if count)
    return (
        f"The full op takes {found['memory_mib']:.0f} MiB above its inputs (goal: at most 64: "
        f"{VERDICTS[found['memory_mib'] <= 64]}). Certified, of {found['T']:,} states moved by 2% of their norm "
        f"({settled}): {proved:.2f} ms where the full op takes {full:.2f}, {found['ratio']:.1f} × (goal 10: "
        f"{VERDICTS[found['ratio'] >= 10]}); {found['differing']} positions differ."
    )


def seven_lines(found: Mapping[str, Any]) -> list[str]:
    size = found["size"]
    text = [
        f"A model of Llama 2 7B's shape ({size['layers']} layers of {size['hidden']}, {size['dtype']}), "
        f"{size['probes']} probes of {size['length']} + {size['length']} tokens, int8 on one component. The "
        "loop swaps the weight, reads all probes in one batch without a cache, and takes the logits of completions "
        "alone; times are of one configuration.",
        "",
        "| model | loop | sweep of all, FDT of every probe | × the loop | race for the best ten | × the loop |",
        "|---|---|---|---|---|---|",
    ]
    for kind, name in KINDS.items():
        if kind not in found:
            continue
        sweep, races = found[kind]["sweep"], [each for each in found[kind].get("races", []) if each]
        ratio = (
            f"{sweep['ratio']:.2f} (goal {GOALS['sweep']:.0f}: {VERDICTS[sweep['ratio'] >= GOALS['sweep']]})"
        )
        raced = "; ".join(
            f"{each['seconds'] * 1e3:.1f} ms by {each['by']}, error {each['error']}" for each in races
        )
        best = max((each["ratio"] for each in races), default=None)
        verdict = (
            ""
            if best is None
            else f"{best:.2f} (goal {GOALS['race']:.0f}: {VERDICTS[best >= GOALS['race']]})"
        )
        text.append(
            f"| {name} | {sweep['loop_seconds'] * 1e3:.0f} ms ({sweep['loop_configurations']} components) | "
            f"{sweep['seconds'] * 1e3:.1f} ms ({sweep['configurations']}) | {ratio} | {raced} | {verdict} |"
        )
    days = ", ".join(f"{name} {value:.1f}" for name, value in found["beam"].items())
    text += [
        "",
        f"The paper's beam search of its 7B model, at most {EVALUATIONS:,} evaluations of {PAPER_PROBES:,} probes of "
        f"100 + 100 tokens, would take on this GPU, in days: {days}. Assumed: every evaluation costs what one of these "
        f"does, scaled by the number of probes from {size['probes']}.",
    ]
    return text


def section(report: Mapping[str, Any], source: str) -> str:
    machine = report["machine"]
    text = [
        f"## On a GPU: {machine['gpu']}",
        "",
        f"Written by `python -m benchmarks.cuda.page` from `benchmarks/results/{source}`: {machine['gpu']} "
        f"({machine['multiprocessors']} multiprocessors, driver {machine['driver']}, CUDA {machine['cuda']}), torch "
        f"{machine['torch']}, {machine['date']}, commit {machine['git_sha']}. How it is measured, and what the kernels "
        "can reach at most: [gpu.md](gpu.md).",
        "",
        "Medians of 15 rounds in one process, in which all take turns; CUDA graphs of many calls on buffers in turn, "
        "so that no input is in the cache. Every result of ours was compared first. A ratio is how many times as "
        "long the other takes.",
    ]
    if "runs" in report:
        text += [
            "",
            "Rows are of several runs:",
            "",
            *(f"- {run}: {what}" for run, what in report["runs"].items()),
        ]
    for operation, found in report["kernels"].items():
        limits = ", ".join(f"{name}: {value:,.0f}" for name, value in found["limits"].items())
        text += ["", f"### {operation}", "", f"Measured limits: {limits}.", "", *kernel_rows(found["rows"])]
        if found.get("left_out"):
            text += ["", f"{found['left_out']} rows were left out for want of time."]
        if "certified" in found:
            text += ["", certified_line(found["certified"])]
    for part in ("seven_billion", "seven_billion_float32"):
        if part in report:
            engine = report[part]["peaked"]["engine"]
            text += ["", f"### The evaluator: {engine}", "", *seven_lines(report[part])]
    return "\n".join(text)


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda.page", description=__doc__)
    parser.add_argument("result", type=Path, help="a file that python -m benchmarks.cuda wrote")
    options = parser.parse_args(given)
    text = section(json.loads(options.result.read_text()), options.result.name)
    PAGE.write_text(GPU.put(PAGE.read_text(), text))
    print(f"{PAGE}: {text.count(VERDICTS[True])} goals reached, {text.count(VERDICTS[False])} not")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
