"""The evaluator's section of docs/performance.md, and its picture."""

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.evaluator.stages import PARTS, REST
from benchmarks.sections import EVALUATOR

_GOALS = {"float32": {"sweep": 8.0, "race": 15.0, "beam": 10.0}, "bfloat16": {"sweep": 3.5, "race": 7.0}}
_MEMORY_MIB = 1024.0


def section(report: dict[str, Any], source: str) -> str:
    """The whole section."""
    about = report["machine"]
    lines = [
        "## The evaluator",
        "",
        f"Written by `make bench-evaluator` from `benchmarks/results/{source}`: {about['cpu_model']}, "
        f"{about['threads']} threads, {about['date']}, commit {about['git_sha']}.",
        "",
        "SmolLM2-135M, against the strong loop: transformers' model, the components swapped, the body over all "
        "positions in one batch, the head on the completions, argmax, compare. Same process, threads and probes; "
        "slices of both take turns, and the ratio is the median over them.",
        "",
        "| measurement | goal | measured | verdict |",
        "|---|---|---|---|",
    ]
    for dtype, result in report["results"].items():
        lines += [f"| {' | '.join(row)} |" for row in _rows(dtype, result)]
    lines += ["", *_facts(report), "", "![where the time goes](performance-evaluator.png)"]
    return "\n".join(lines) + "\n"


def _rows(dtype: str, result: dict[str, Any]) -> list[tuple[str, ...]]:
    goals = _GOALS[dtype]
    sweep = result["sweep"]
    rows = [
        _ratio(
            f"{dtype}: {sweep['configurations']} single components, every FDT exact",
            goals["sweep"],
            sweep["ratio"],
        )
    ]
    for treatment, race in result["race"].items():
        name = f"{dtype}: best 10 by FDT_75, {treatment}, racing"
        rows.append(_ratio(name, goals["race"], race["ratio"]))
        rows.append((f"{name}: the same ten", "yes", "yes" if race["same"] else "no", _verdict(race["same"])))
    if "beam" in result:
        beam = result["beam"]
        rows.append(
            _ratio(f"{dtype}: extensions of 100 int8 components by one", goals["beam"], beam["ratio"])
        )
    peak = sweep["peak_extra_mib"]
    rows.append(
        (
            f"{dtype}: peak memory above the model and the base's states",
            f"≤ {_MEMORY_MIB:.0f} MiB",
            f"{peak:.0f} MiB",
            _verdict(peak <= _MEMORY_MIB),
        )
    )
    return rows


def _ratio(name: str, goal: float, measured: float) -> tuple[str, ...]:
    return name, f"≥ {goal:g} × the loop", f"{measured:.2f}", _verdict(measured >= goal)


def _verdict(reached: bool) -> str:
    return "reached" if reached else "**NOT reached**"


def _facts(report: dict[str, Any]) -> list[str]:
    lines = []
    for dtype, result in report["results"].items():
        sweep = result["sweep"]
        loop = result["loop_seconds"]
        own = sum(sweep["seconds"]) / len(sweep["seconds"])
        lines.append(
            f"- {dtype}, {result['engine']}: {own:.3f} s a configuration, the loop {loop:.2f} s; the whole sweep costs "
            f"{own * sweep['configurations'] / loop:.0f} passes of the loop, and {result['build_seconds']:.0f} s "
            "before. "
            f"Mean FDT {', '.join(f'{k} {v:.1f}' for k, v in result['mean_fdt'].items())} of {result['completion']}. "
            f"Others used {sweep['others']:.0%} of the CPUs. FDT was compared with the loop's on "
            f"{result['compared_probes']} probes of configurations: {_differences(result)}."
        )
        for treatment, race in result["race"].items():
            lines.append(
                f"- {dtype}, the race of {treatment}: {race['unread']} candidates were not read at all; the tenth has "
                f"FDT_75 {race['tenth']:g}."
            )
        if "beam" in result:
            lines.append(
                f"- {dtype}, beam: {result['beam']['configurations_per_second']:.2f} configurations/s, mean FDT "
                f"{result['beam']['mean_fdt']:.1f}; computing a parent's states, which is counted, takes "
                f"{result['beam']['start_seconds']:.1f} s."
            )
        for treatment, found in result.get("sensitivity", {}).items():
            lines.append(
                f"- {dtype}, the field's shortcut for {treatment}: one forward and one backward pass, "
                f"{found['seconds']:.1f} s ({found['seconds'] / loop:.1f} passes of the loop); rank correlation of its "
                f"prediction with the measured mean FDT {found['correlation']:.2f}."
            )
    return lines


def _differences(result: dict[str, Any]) -> str:
    ties, beyond = result["ties_within_floor"], result["beyond_floor"]
    if not ties and not beyond:
        return "the same on all"
    found = f"{ties} ties within the floor of {result['floor_margin']:.2g} logits"
    return f"{found}, beyond it {len(beyond)} ({'; '.join(beyond)})" if beyond else f"{found}, none beyond it"


def write(docs: Path, text: str, report: dict[str, Any]) -> None:
    """Puts the section into docs/performance.md, in place of an older one."""
    path = docs / "performance.md"
    path.write_text(EVALUATOR.put(path.read_text(), text))
    picture(report, docs / "performance-evaluator.png")


def picture(report: dict[str, Any], path: Path) -> None:
    """A stacked bar for each dtype: where the time of a configuration goes, beside the loop's."""
    figure, axes = plt.subplots(figsize=(9, 2.6), layout="constrained")
    names = [*(name for name, _, _ in PARTS), REST]
    labels = []
    for place, (dtype, result) in enumerate(report["results"].items()):
        sweep = result["sweep"]
        start = 0.0
        for number, name in enumerate(names):
            width = sweep["stages"].get(name, 0.0) / sweep["configurations"]
            axes.barh(2 * place, width, left=start, color=f"C{number}", label=name if place == 0 else None)
            start += width
        axes.barh(
            2 * place + 1,
            result["loop_seconds"],
            color="#bbbbbb",
            label="strong loop" if place == 0 else None,
        )
        labels += [f"{dtype}, ours", f"{dtype}, strong loop"]
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.set_xlabel("seconds a configuration, mean over the sweep of all components")
    axes.legend(fontsize=7, ncols=2)
    figure.savefig(path, dpi=110)
    plt.close(figure)
