"""The tables as Markdown: python -m benchmarks.paper_tables.page TABLES.json … writes them into docs/results.md.

What is read out of them stands between the tables, by hand, and stays.
"""

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.sections import Section

PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "results.md"
_METRICS = (("fdt", "FDT"), ("sdt", "SDT"), ("dppl", "DPPL"), ("perplexity", "perplexity"), ("kl", "KL"))


def device_name(device: str) -> str:
    """The GPU's name, or cpu."""
    return torch.cuda.get_device_name() if device.startswith("cuda") else "cpu"


def lines(name: str, measured: dict[str, Any]) -> list[str]:
    """One table, and where and how it was measured."""
    found = measured["table"]
    if name == "discriminability":
        table = _discriminability(found)
    elif name == "joint":
        table = _joint(found)
    elif name == "pruning":
        table = [*_measurements(found["rows"]), "", *_sparsity(found)]
    else:
        table = _measurements(found)
    return [*table, "", _about(name, measured)]


def _about(name: str, measured: dict[str, Any]) -> str:
    machine, scale = measured["machine"], measured["scale"]
    where = machine["cpu_model"] if machine["device"] == "cpu" else machine["device"]
    probes = f"{scale['probes']} probes of {scale['prefix']} + {scale['completion']} tokens"
    if name == "discriminability":
        done = f"{scale['trials']} trials, {probes}"
    else:
        confirmed = f", {scale['confirms']} confirmed" if name == "joint" else ""
        done = f"{probes} chose{confirmed}, {scale['judges']} others judge"
    run = (
        f"{measured['seconds'] / 60:.0f} minutes in {measured['dtype']} on {where}, torch {machine['torch']}"
    )
    return f"*{done}. {run}, {machine['date']}, commit {machine['git_sha']}.*"


def _measurements(rows: Sequence[dict[str, Any]]) -> list[str]:
    head = ["configuration", "components", "bits", "FDT_75", *(label for _, label in _METRICS)]
    return _table(
        head,
        (
            [
                row["name"],
                str(row["components"]),
                f"{row['bits']:.2f}",
                f"{row['fdt']['p75']:.1f}",
                *(_mean(row[metric]) for metric, _ in _METRICS),
            ]
            for row in rows
        ),
    )


def _mean(summary: dict[str, Any]) -> str:
    low, high = summary["mean_interval"]
    return f"{_number(summary['mean'])} ({_number(low)} – {_number(high)})"


def _number(value: float) -> str:
    return f"{value:.1f}" if abs(value) >= 20 else f"{value:.3g}"


def _sparsity(found: dict[str, Any]) -> list[str]:
    kinds = {key: value for key, value in found["sparsity"].items() if not key.startswith("layer ")}
    layers = [value for key, value in found["sparsity"].items() if key.startswith("layer ")]
    head = [f"sparsity at a mean of {found['at']:.0%}", *kinds]
    lines = _table(head, [["by FDT", *(f"{value:.0%}" for value in kinds.values())]])
    by_layer = ", ".join(f"{value:.0%}" for value in layers)
    return [*lines, "", f"By layer, first to last: {by_layer}."]


def _discriminability(rows: Sequence[dict[str, Any]]) -> list[str]:
    head = ["metric", "random is worse", "the same", "random is better", "told apart (50% is guessing)"]
    return _table(
        head,
        (
            [row["name"], str(row["worse"]), str(row["same"]), str(row["better"]), f"{row['told']:.1%}"]
            for row in rows
        ),
    )


def _joint(rows: Sequence[dict[str, Any]]) -> list[str]:
    families = list(dict.fromkeys(row["name"] for row in rows))
    by = {(row["name"], row["budget"]): row for row in rows}

    def cell(family: str, budget: float) -> str:
        row = by.get((family, budget))
        if row is None or "why_not" in row:
            return "cannot be reached"
        fdts = [row["confirming"]["fdt"], row["fdt"]["mean"], row["choosing"]["fdt"]]
        return (
            f"{' / '.join(f'{each:.1f}' for each in fdts)}; {row['sdt']['mean']:.1f}; {row['dppl']['mean']:.3f}; "
            f"{row['bits']:.2f} bits"
        )

    budgets = list(dict.fromkeys(row["budget"] for row in rows))
    cells = "FDT confirmed / judged / where it was found; SDT, DPPL judged; size"
    head = [f"bits at most ({cells})", *families]
    return _table(
        head, ([f"{budget:g}", *(cell(family, budget) for family in families)] for budget in budgets)
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [list(head), ["---"] * len(head), *map(list, rows)]
    return ["| " + " | ".join(line) + " |" for line in lines]


def write(report: dict[str, Any], page: str) -> str:
    """``page`` with every table of the report that it has a place for renewed."""
    for name, measured in report.items():
        if (section := Section(name)).of(page):
            page = section.put(page, "\n".join(lines(name, measured)))
    return page


if __name__ == "__main__":
    for each in sys.argv[1:]:
        PAGE.write_text(write(json.loads(Path(each).read_text()), PAGE.read_text()))
