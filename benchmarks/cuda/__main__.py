"""python -m benchmarks.cuda --out FILE.json: the kernels and the evaluator on a GPU; benchmarks/cuda/on_device.sh.

A part whose name is in FILE.json already is measured anew, the others stay: each part may run in a process of its own.
Exit code 1 where a result is wrong: of a kernel, or an FDT that differs from the strong loop's by more than rounding.
"""

import argparse
import json
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks import machine
from benchmarks.cuda import evaluation, kernels, seven_billion, unpacking

DTYPES = ("float32", "bfloat16")
SEVEN_BILLION = {"seven_billion": seven_billion.Size(), "seven_billion_float32": seven_billion.FLOAT32}


def gpu(device: torch.device) -> dict[str, Any]:
    """The GPU and its software."""
    if device.type != "cuda":
        return {"gpu": "none: a trial on the CPU"}
    about = torch.cuda.get_device_properties(device)
    try:
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver = "unknown"
    return {
        "gpu": about.name,
        "gpu_memory_gib": round(about.total_memory / 2**30, 1),
        "multiprocessors": about.multi_processor_count,
        "compute_capability": f"{about.major}.{about.minor}",
        "driver": driver,
        "cuda": torch.version.cuda,
        "float32_products": torch.get_float32_matmul_precision(),
    }


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file")
    parser.add_argument(
        "--only",
        choices=["unpack_mask", "kernels", *kernels.PARTS, *DTYPES, *SEVEN_BILLION],
        help="one part",
    )
    parser.add_argument("--quick", action="store_true", help="few sizes")
    parser.add_argument(
        "--seconds",
        type=float,
        help=f"of each kernel and of seven_billion ({seven_billion.SECONDS:.0f}): no row begins later",
    )
    # To try the program where there is no GPU: few short probes, and no figure that means anything.
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)
    parser.add_argument("--components", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(given)
    device = torch.device(options.device)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    report: dict[str, Any] = {
        "machine": machine.describe() | gpu(device) | {"transformers": transformers.__version__},
        "trial": device.type != "cuda" or options.components is not None,
        "evaluator": {},
        "kernels": {},
    }
    if options.out.exists():
        report |= json.loads(options.out.read_text()) | {name: report[name] for name in ("machine", "trial")}
    text = []

    def save(lines: list[str]) -> None:
        """After every part, so that what was measured is kept however the rest ends."""
        text.extend(lines)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n")
        print("\n".join(lines), flush=True)

    if device.type == "cuda" and options.only in (None, "unpack_mask"):
        report["unpack_mask"] = unpacking.run()
        save(unpacking.lines(report["unpack_mask"]))
    for name in kernels.PARTS:
        if device.type == "cuda" and options.only in (None, "kernels", name):

            def keep_part(found: dict[str, Any], name: str = name) -> None:
                report["kernels"][name] = found
                save([])

            kernels.run(name, options.quick, options.seconds, partial(print, flush=True), keep_part)
    for name in DTYPES:
        if options.only in (None, name):
            report["evaluator"][name] = evaluation.run(getattr(torch, name), device, options.components)
            save(evaluation.lines(name, report["evaluator"][name]))
    for name, size in SEVEN_BILLION.items():
        if options.only in (None, name):
            if report["trial"]:
                size = replace(seven_billion.SMALL, dtype=size.dtype)

            def keep(found: dict[str, Any], name: str = name) -> None:
                report[name] = found
                save([f"{found['seconds']:.0f} s"])

            seven_billion.run(device, size, options.seconds or seven_billion.SECONDS, keep)
            save(seven_billion.lines(report[name]))
    about = report["machine"]
    print(f"\n{about['gpu']}, torch {about['torch']}, {about['date']}", *text, sep="\n")
    wrong = [row["wrong"] for row in report.get("unpack_mask", {}).get("rows", []) if row["wrong"]]
    wrong += [row["wrong"] for each in report["kernels"].values() for row in each["rows"] if row["wrong"]]
    wrong += [each["certified"]["differing"] for each in report["kernels"].values() if "certified" in each]
    wrong += [each["sweep"]["beyond_floor"] for each in report["evaluator"].values()]
    for name in SEVEN_BILLION:
        wrong += seven_billion.wrong(report.get(name, {}))
    return 1 if any(wrong) or any(each["base_diverges"] for each in report["evaluator"].values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
