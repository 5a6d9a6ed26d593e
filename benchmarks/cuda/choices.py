"""python -m benchmarks.cuda.choices RESULT.json: what backend=None takes on that GPU, into dtm_fast/ops/gpu_choices/.

For each operation and range of tokens the backends by the geometric mean of their times over all sizes. One that gave a
wrong result, or failed, at any size of a range is left out of it.
"""

import argparse
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cuda.contest import OURS
from dtm_fast.ops import gpu_choices

# What the table calls the backends. "reference" is what the twin does on a GPU; that of int8_linear multiplies in
# float64, that of bitmap_linear expands the weight: these two are not timed.
CONTENDERS = {
    "int8_linear": {"cuda": OURS, "triton": "triton"},
    "masked_linear": {"cuda": OURS, "triton": "triton", "reference": "F.linear(x, w * mask)"},
    "bitmap_linear": {"cuda": OURS, "triton": "triton"},
    "token_divergence": {"cuda": OURS, "triton": "triton", "reference": "matmul and argmax, eager"},
}
RANGES = (16, None)  # up to so many tokens


def ranking(rows: Sequence[Mapping[str, Any]], contenders: Mapping[str, str]) -> list[str]:
    """The backends of some rows, the fastest first; "reference" at the end if it was not timed."""
    able = [
        backend
        for backend, name in contenders.items()
        if all(name in row["contenders"] and name not in row["wrong"] for row in rows)
    ]
    means = {
        backend: math.prod(row["contenders"][contenders[backend]]["median_s"] for row in rows)
        ** (1 / len(rows))
        for backend in able
    }
    found = sorted(able, key=means.__getitem__)
    return found if "reference" in found else [*found, "reference"]


def choices(report: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The content of the file."""
    rows = []
    for operation, contenders in CONTENDERS.items():
        measured = [
            row
            for row in report["kernels"].get(operation, {}).get("rows", [])
            if row.get("V", 1) == 1 or "T" in row
        ]
        low = 0
        for most in RANGES:
            these = [row for row in measured if low < row.get("M", row.get("T", 0)) <= (most or math.inf)]
            low = most or 0
            for dtype in sorted({row["dtype"] for row in these}):
                of_dtype = [row for row in these if row["dtype"] == dtype]
                rows.append(
                    {
                        "operation": operation,
                        "dtype": dtype,
                        "most_tokens": most,
                        "ranking": ranking(of_dtype, contenders),
                    }
                )
    machine = report["machine"]
    return {
        "device": machine["gpu"],
        "capability": machine["compute_capability"],
        "source": source,
        "rows": rows,
    }


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda.choices", description=__doc__)
    parser.add_argument("result", type=Path, help="a file that python -m benchmarks.cuda wrote")
    options = parser.parse_args(given)
    found = choices(json.loads(options.result.read_text()), options.result.name)
    name = re.sub(r"[^a-z0-9]+", "-", found["device"].lower()).strip("-")
    file = gpu_choices.FOLDER / f"{name}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{file}: {len(found['rows'])} choices")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
