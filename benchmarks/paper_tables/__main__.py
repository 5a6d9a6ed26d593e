"""python -m benchmarks.paper_tables [--quick]: the paper's experiments on SmolLM2, docs/results.md.

What was measured is kept in --run, so that a run that was broken off goes on where it was.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks import machine
from benchmarks.paper_tables import page
from benchmarks.paper_tables.discriminability import discriminability
from benchmarks.paper_tables.joint import joint
from benchmarks.paper_tables.laboratory import FULL, QUICK, Laboratory
from benchmarks.paper_tables.pruning import allocation, recovered
from benchmarks.paper_tables.quantization import absmax, gptq

TABLES: dict[str, Callable[[Laboratory], Any]] = {
    "absmax": absmax,
    "gptq": gptq,
    "pruning": allocation,
    "recovered": recovered,
    "discriminability": discriminability,
    "joint": joint,
}


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper_tables", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="a few minutes: few short probes, no figures to quote"
    )
    parser.add_argument(
        "--run",
        type=Path,
        help="the run directory, by default runs/paper or runs/paper-quick; one for each dtype",
    )
    parser.add_argument("--only", nargs="+", choices=list(TABLES), default=list(TABLES), help="some tables")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of the model")
    parser.add_argument("--scale", default="{}", help="JSON of what to do otherwise than the whole run does")
    parser.add_argument("--out", type=Path, help="the JSON file, by default in the run directory")
    options = parser.parse_args(given)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    known = QUICK if options.quick else FULL
    changes = {name: tuple(v) if isinstance(v, list) else v for name, v in json.loads(options.scale).items()}
    scale = type(known)(**{**vars(known), **changes})
    folder = options.run or Path("runs") / ("paper-quick" if options.quick else "paper")
    lab = Laboratory(scale, folder, options.device, getattr(torch, options.dtype))
    out = options.out or folder / "tables.json"
    report: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    for name in options.only:
        print(f"{name} …", flush=True)
        started = time.perf_counter()
        found = TABLES[name](lab)
        report[name] = {
            "table": found,
            "seconds": time.perf_counter() - started,
            "dtype": options.dtype,
            "machine": machine.describe() | {"device": page.device_name(options.device)},
            "scale": vars(scale),
        }
        out.write_text(json.dumps(report, indent=1) + "\n")
        print("\n".join(page.lines(name, report[name])), "\n", flush=True)
    lab.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
