"""The page of the paper's tables."""

import json

import pytest

from benchmarks.paper_tables import page
from benchmarks.paper_tables.laboratory import FULL, QUICK

pytestmark = pytest.mark.once

COMMITTED = page.PAGE.parent.parent / "benchmarks" / "results" / "nvidia-h200-2026-11-27-paper-tables.json"


def test_the_committed_page_has_the_committed_figures():
    text = page.PAGE.read_text()
    assert page.write(json.loads(COMMITTED.read_text()), text) == text


def test_only_what_stands_between_the_marks_is_written():
    report = json.loads(COMMITTED.read_text())
    written = page.write(
        report, "before\n<!-- absmax -->\nold\n<!-- end of absmax -->\nafter <!-- joint -->\n"
    )
    first, *table, last = written.splitlines()[1:-1]
    assert (first, last) == ("<!-- absmax -->", "<!-- end of absmax -->")
    assert len(table) == 2 + len(report["tables"]["absmax"])
    assert written.startswith("before\n")
    assert written.endswith("\nafter <!-- joint -->\n")


def test_every_table_has_lines():
    summary = {"mean": 30.0, "mean_interval": [20.0, 40.0], "p75": 50.0}
    row = {"name": "x", "components": 3, "bits": 9.5, **{name: summary for name, _ in page._METRICS}}
    joint = row | {"budget": 8.0, "choosing": {"fdt": 31.0}}
    report = {
        "tables": {
            "pruning": {"rows": [row], "sparsity": {"mlp.up_proj": 0.5, "layer 0": 0.25}, "at": 0.5},
            "recovered": [row],
            "discriminability": [{"name": "kl", "worse": 7, "same": 2, "better": 1, "told": 0.8}],
            "joint": [joint, {"name": "int8 alone", "budget": 8.0, "why_not": "budget: …"}],
        }
    }
    lines = {name: page.table(name, report) for name in report["tables"]}
    assert lines["pruning"][2] == "| x | 3 | 9.50 | 50.0 |" + " 30.0 (20.0 – 40.0) |" * 5
    assert "By layer, first to last: 25%." in lines["pruning"]
    assert lines["discriminability"][2] == "| kl | 7 | 2 | 1 | 80.0% |"
    assert "cannot be reached" in lines["joint"][2]


def test_the_scales_can_be_meant():
    for scale in (FULL, QUICK):
        total = 0.0
        reached = [round(total := total + each, 6) for each in scale.rounds]
        assert set(scale.shown) <= set(reached)
        assert scale.int4 <= scale.converted <= 210 // scale.stride + 1
