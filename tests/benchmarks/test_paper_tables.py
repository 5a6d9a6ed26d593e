"""The page of the paper's tables."""

import json
import re

import pytest

from benchmarks.paper_tables import page
from benchmarks.paper_tables.laboratory import FULL, QUICK
from benchmarks.rounding import ROUNDING

pytestmark = pytest.mark.once

COMMITTED = sorted((page.PAGE.parent.parent / "benchmarks" / "results").glob("*-paper-tables.json"))
MEASURED = {
    "seconds": 90.0,
    "dtype": "bfloat16",
    "machine": {"cpu_model": "a CPU", "device": "cpu", "torch": "2", "date": "today", "git_sha": "abc"},
    "scale": {"probes": 4, "judges": 8, "confirms": 6, "trials": 10, "prefix": 10, "completion": 20},
}
SUMMARY = {"mean": 30.0, "mean_interval": [20.0, 40.0], "p75": 50.0}
ROW = {"name": "x", "components": 3, "bits": 9.5, **{name: SUMMARY for name, _ in page._METRICS}}


def test_the_committed_page_has_the_committed_figures():
    text = page.PAGE.read_text()
    for each in COMMITTED:
        assert page.write(json.loads(each.read_text()), text) == text


def test_every_table_of_the_page_is_committed_once():
    measured = [name for each in COMMITTED for name in json.loads(each.read_text())]
    others = [ROUNDING.name]  # of a program of its own
    assert sorted(measured + others) == sorted(re.findall("<!-- end of (.+) -->", page.PAGE.read_text()))


def test_only_what_stands_between_the_marks_is_written():
    report = {"absmax": {"table": [ROW], **MEASURED}}
    written = page.write(
        report, "before\n<!-- absmax -->\nold\n<!-- end of absmax -->\nafter <!-- joint -->\n"
    )
    first, *table, last = written.splitlines()[1:-1]
    assert (first, last) == ("<!-- absmax -->", "<!-- end of absmax -->")
    assert table == page.lines("absmax", report["absmax"])
    assert written.startswith("before\n")
    assert written.endswith("\nafter <!-- joint -->\n")


def test_every_table_has_lines():
    found = {
        "pruning": {"rows": [ROW], "sparsity": {"mlp.up_proj": 0.5, "layer 0": 0.25}, "at": 0.5},
        "recovered": [ROW],
        "discriminability": [{"name": "kl", "worse": 7, "same": 2, "better": 1, "told": 0.8}],
        "joint": [
            ROW | {"budget": 8.0, "choosing": {"fdt": 31.0}, "confirming": {"fdt": 29.0}},
            {"name": "int8 alone", "budget": 8.0, "why_not": "budget: …"},
        ],
    }
    lines = {name: page.lines(name, {"table": table, **MEASURED}) for name, table in found.items()}
    assert lines["pruning"][2] == "| x | 3 | 9.50 | 50.0 |" + " 30.0 (20.0 – 40.0) |" * 5
    assert "By layer, first to last: 25%." in lines["pruning"]
    assert lines["discriminability"][2] == "| kl | 7 | 2 | 1 | 80.0% |"
    assert lines["discriminability"][-1].startswith("*10 trials, 4 probes of 10 + 20 tokens. 2 minutes in")
    assert lines["joint"][2] == "| 8 | 29.0 / 30.0 / 31.0; 30.0; 30.000; 9.50 bits | cannot be reached |"
    assert lines["joint"][-1].startswith(
        "*4 probes of 10 + 20 tokens chose, 6 confirmed, 8 others judge. 2 min"
    )
    assert lines["recovered"][-1] == (
        "*4 probes of 10 + 20 tokens chose, 8 others judge. "
        "2 minutes in bfloat16 on a CPU, torch 2, today, commit abc.*"
    )


def test_the_scales_can_be_meant():
    for scale in (FULL, QUICK):
        total = 0.0
        reached = [round(total := total + each, 6) for each in scale.rounds]
        assert set(scale.shown) <= set(reached)
        assert scale.int4 <= scale.converted <= 210 // scale.stride + 1
