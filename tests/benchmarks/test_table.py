import json
from pathlib import Path

import torch

from benchmarks import figures, run, table
from benchmarks.case import Case, Result
from benchmarks.goals import Goal
from benchmarks.interleave import Timing
from benchmarks.limits import Limits


def made_up_report() -> dict[str, object]:
    case = Case(
        "int8_linear",
        2,
        3,
        4,
        torch.float32,
        build=None,  # type: ignore[arg-type]
        flops=1e9,
        bytes=1e6,
        arithmetic=("int8_vnni",),
        goals=(
            Goal("≥ 1.0 × FBGEMM", "speed", ("FBGEMM",), 1.0),
            Goal("≥ 9 × other", "speed", ("other",), 9.0),
        ),
    )
    result = Result(case, {"dtm_fast": Timing([0.002] * 3), "FBGEMM": Timing([0.001] * 3)})
    result.unavailable["other"] = "not installed | at all"
    limits = Limits(
        2, best={"int8_vnni": 1000.0, "read": 30.0}, unavailable={"int8_amx": "no such instruction"}
    )
    about = {
        "cpu_model": "A CPU",
        "cpus": 2,
        "memory_gib": 8,
        "isa": "avx512_vnni",
        "threads": 2,
        "load_average_at_start": [0.1, 0.2, 0.3],
        "date": "2026-01-01 00:00 UTC",
        "torch": "2",
        "dtm_fast": "0",
        "git_sha": "abc",
        "python": "3",
        "system": "Linux",
    }
    report = run.report_json(about, [result], limits, quick=True, whole=True)
    return json.loads(json.dumps(report))  # the page is made of what the file holds


def test_the_page_tells_losses_and_who_is_missing() -> None:
    page = table.page(made_up_report(), "file.json")
    assert "| int8_linear (2, 3, 4) float32 | ≥ 1.0 × FBGEMM | 0.5 | **NOT reached** | 0% |" in page
    assert (
        "| int8_linear (2, 3, 4) float32 | ≥ 9 × other | – | not measured: other: not installed \\| at all | – |"
        in page
    )
    assert "| (2, 3, 4) float32 | 2 ms | 500 | 0.5 | 50% | – | 0.50 (1 ms) | not available |" in page
    assert "- other in int8_linear: not available: not installed | at all (1 row)" in page
    assert "| int8_amx | not available: no such instruction |" in page
    assert "A quick run" in page
    assert "Load average at the start 0.10, 0.20, 0.30" in page


def test_times_have_units() -> None:
    assert [table.seconds(each) for each in (1.5, 0.0123, 4.2e-5, 3e-8)] == [
        "1.5 s",
        "12.3 ms",
        "42 µs",
        "30 ns",
    ]


def test_the_pictures_are_drawn(tmp_path: Path) -> None:
    for draw in (figures.roofline, figures.bars):
        draw(made_up_report(), tmp_path / "picture.png")
        assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
