"""A report as docs/performance.md: limits, goals with verdicts, times beside the peers; losses included.

python -m benchmarks.table RESULT.json prints the page of an earlier run again.
"""

import json
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

OURS = "dtm_fast"


def page(report: dict[str, Any], source: str) -> str:
    """The whole page."""
    parts = [
        "# Performance",
        "",
        f"Written by `make bench` from `benchmarks/results/{source}`; do not edit by hand.",
        "",
        *_about(report),
        "",
        *_limits(report["limits"]),
        "",
        *_goals(report["verdicts"]),
        "",
        *_times(report["rows"]),
        *_reasons(report["rows"]),
        "![roofline](performance-roofline.png)",
        "",
        "![speed beside the peers](performance-bars.png)",
    ]
    return "\n".join(parts) + "\n"


def progress(row: dict[str, Any]) -> str:
    """One line for whoever waits."""
    ratios = ", ".join(
        f"{ratio:.2f} × {peer}" for peer, ratio in row["speedup_vs"].items() if ratio is not None
    )
    ours = row["contenders"].get(OURS)
    own = (
        seconds(ours["median_s"]) if ours else (row["wrong"] | row["not_available"]).get(OURS, "did not run")
    )
    return f"{row['name']}: {own}; {ratios}"


def seconds(value: float) -> str:
    """A time with three digits and a fitting unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e-9:.3g} ns"


def _about(report: dict[str, Any]) -> list[str]:
    about = report["machine"]
    lines = [
        f"- Machine: {about['cpu_model']}, {about['cpus']} CPUs, {about['memory_gib']} GiB, {about['system']}",
        f"- Date: {about['date']}; threads: {about['threads']}; kernels: {about['isa']}",
        f"- Load average at the start {_numbers(about['load_average_at_start'])}, at the end "
        f"{_numbers(about.get('load_average_at_end', []))} (1, 5, 15 minutes; our own threads count at the end)",
        f"- torch {about['torch']}, dtm_fast {about['dtm_fast']}, commit {about['git_sha']}, "
        f"Python {about['python']}",
        f"- Medians of {about.get('rounds', '?')} interleaved rounds in one process. Ratios are medians over the "
        "rounds of the ratio within a round. Every contender's result was checked before it was timed.",
    ]
    shares = [share for row in report["rows"] for share in row["disturbance"]]
    if shares:
        lines.append(
            f"- While we measured, other processes used {statistics.median(shares):.0%} of the CPUs (median round; "
            f"worst {max(shares):.0%}); {sum(row['rounds_discarded'] for row in report['rows'])} rounds that they "
            "disturbed more were measured again."
        )
        if statistics.median(shares) > 0.05:
            lines.append("- **The machine was not quiet**: measure again before quoting.")
    if report["quick"]:
        lines.append("- **A quick run**: few rounds, some rows and peers left out. Not for quoting.")
    if not report["whole"]:
        lines.append("- **A partial run**: operations were left out.")
    return lines


def _numbers(values: Iterable[float]) -> str:
    return ", ".join(f"{each:.2f}" for each in values) or "?"


def _limits(limits: dict[str, Any]) -> list[str]:
    rows = [[name, f"{value:,.0f} {limits['units'][name]}"] for name, value in limits["best"].items()]
    rows += [[name, f"not available: {reason}"] for name, reason in limits["unavailable"].items()]
    return [
        "## What the machine can do",
        "",
        f"The best of the loops in `csrc/bench` on {limits['threads']} threads, measured between the rows: "
        "multiplications and additions in registers, and reading memory once. "
        "The share of roof below is of the best instruction that the machine has for the type, whether our kernels "
        "use it or not.",
        "",
        *_table(["limit", "measured"], rows),
    ]


def _goals(verdicts: Sequence[dict[str, Any]]) -> list[str]:
    rows = [
        [
            each["row"],
            each["goal"],
            "–" if each["measured"] is None else f"{each['measured']:.3g}",
            f"**{each['verdict']}**" if each["verdict"].startswith("NOT") else each["verdict"],
            "–" if each["measured"] is None else f"{each['others']:.0%}",
        ]
        for each in verdicts
    ]
    reached = sum(each["verdict"] == "reached" for each in verdicts)
    missed = sum(each["verdict"].startswith("NOT") for each in verdicts)
    return [
        "## Goals",
        "",
        f"{reached} reached, {missed} NOT reached, {len(verdicts) - reached - missed} without a figure. "
        "Shapes are (M, K, N). Others: what other processes used of the CPUs meanwhile; a verdict with more than 5% "
        "there says little. What stands in the way of those not reached: [goals-not-reached.md](goals-not-reached.md).",
        "",
        *_table(["row", "goal", "measured", "verdict", "others"], rows),
    ]


def _times(rows: Sequence[dict[str, Any]]) -> list[str]:
    lines = ["## Times beside the peers", ""]
    for operation in dict.fromkeys(row["op"] for row in rows):
        chosen = [row for row in rows if row["op"] == operation]
        peers = list(
            dict.fromkeys(
                name
                for row in chosen
                for name in (*row["contenders"], *row["not_available"], *row["wrong"])
                if name != OURS
            )
        )
        head = ["row", OURS, "GOP/s", "GB/s", "share of roof", "others", *(f"× {peer}" for peer in peers)]
        extra = list(dict.fromkeys(name for row in chosen for name in row["extra"]))
        body = [
            [
                row["name"].removeprefix(operation).strip(),
                *_own(row),
                *(_cell(row, peer) for peer in peers),
                *(_extra(row["extra"].get(name)) for name in extra),
            ]
            for row in chosen
        ]
        lines += [f"### {operation}", "", *_table([*head, *extra], body), ""]
    lines += [
        "`× peer`: how many times as fast as the peer we are; below 1 the peer is faster. Share of roof: of what "
        "arithmetic and memory allow together for the least bytes, from the limits above. Others: the share of the "
        "CPUs that other processes used in the row's median round. Where Linux has large pages, weights of "
        "`sparse_linear` lie on them, and those of `int8_linear` for all who take them as they are; what FBGEMM and "
        "oneDNN pack, and dense weights, lie where torch puts them.",
        "",
    ]
    return lines


def _own(row: dict[str, Any]) -> list[str]:
    if OURS not in row["contenders"]:
        return [(row["wrong"] | row["not_available"]).get(OURS, "did not run"), "–", "–", "–", "–"]
    share = row["share_of_roof"]
    return [
        seconds(row["contenders"][OURS]["median_s"]),
        f"{row['gflops']:,.0f}",
        f"{row['gbps']:.1f}",
        "–" if share is None else f"{share:.0%}",
        f"{statistics.median(row['disturbance']):.0%}" if row["disturbance"] else "–",
    ]


def _cell(row: dict[str, Any], peer: str) -> str:
    if peer in row["wrong"]:
        return "WRONG"
    if peer in row["not_available"]:
        return "not available"
    ratio = row["speedup_vs"].get(peer)
    if ratio is None:
        return "–"
    return f"{ratio:.2f} ({seconds(row['contenders'][peer]['median_s'])})"


def _extra(value: float | str | None) -> str:
    return "–" if value is None else value if isinstance(value, str) else f"{value:.1f}"


def _reasons(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Why someone is missing: once per peer and reason, with the number of rows."""
    count: dict[tuple[str, str, str], int] = {}
    for row in rows:
        for name, reason in (row["not_available"] | row["wrong"]).items():
            key = (row["op"], name, reason)
            count[key] = count.get(key, 0) + 1
    if not count:
        return []
    lines = [
        f"- {name} in {operation}: not available: {reason} ({rows} row{'s' if rows > 1 else ''})"
        for (operation, name, reason), rows in count.items()
    ]
    return ["### Who is missing, and why", "", *lines, ""]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(each.replace("|", "\\|") for each in cells) + " |"

    return [line(head), "|" + "---|" * len(head), *(line(row) for row in rows)]


if __name__ == "__main__":
    given = Path(sys.argv[1])
    print(page(json.loads(given.read_text()), given.name), end="")
