"""The page as text: complete, escaped, and without anything from elsewhere."""

import json
import re
from pathlib import Path

import pytest
from made_run import N, make_run, sweep
from page_text import Elements

from dtm_fast.compression import Int8
from dtm_fast.report import write_report
from dtm_fast.report.content import read_content
from dtm_fast.report.figures import heat_map
from dtm_fast.report.page import page
from dtm_fast.runs import RunDirectory

HOSTILE = "</script><script>window.injected = true</script><img src=x onerror=injected()>$x_ \"'&"


def test_the_page_says_what_it_must(finished: RunDirectory) -> None:
    read = Elements(page(read_content(finished)))
    for words in (
        "made-model",
        "6 of 12 components",
        "Each component alone in int8",
        "never leaves its own text (160 positions)",
        "dtm-fast plan made-model --run 'a b'",
        "2026-01-02 03:04:05+00:00",
        "The plan as a table: 6 treated components",
        "Made CPU",
        "avx2, avx512",
        "torch 2.6",
        "15 measurements in 22.5 s",
        "2 tokens that decoding with a cache chose otherwise were corrected",
        "least FDT75 30",
        f"{N} means that it never would have",
        "model.layers.3.mlp.down_proj",
    ):
        assert words in read.text, words
    # 6 treated components, 3 points of the curve, 12 measured components, and a head each.
    assert read.count("tr") == 7 + 4 + 13


def test_nothing_is_loaded_from_elsewhere(finished: RunDirectory) -> None:
    read = Elements(page(read_content(finished)))
    for tag, attributes in read.elements:
        assert tag not in ("link", "iframe", "object", "embed", "img")
        assert not {"src", "href", "srcset", "data"} & attributes.keys(), (tag, attributes)
    style = re.search(r"<style>(.*?)</style>", page(read_content(finished)), re.S)
    assert style is not None
    assert "url(" not in style[1]
    assert "@import" not in style[1]


def test_text_of_the_run_cannot_become_markup(tmp_path: Path) -> None:
    listed = [
        {"path": f"model.layers.0.{HOSTILE}", "layer": 0, "name": HOSTILE, "shape": [2, 5]},
        {"path": "model.layers.0.mlp", "layer": 0, "name": "mlp", "shape": [2, 5]},
    ]
    with make_run(
        tmp_path / "clean", [{**c, "name": f"n{i}", "path": f"p{i}"} for i, c in enumerate(listed)]
    ) as run:
        sweep(run, ["p0", "p1"], Int8())
        clean = page(read_content(run))
    with make_run(tmp_path / "run", listed, model=HOSTILE) as run:
        sweep(run, [c["path"] for c in listed], Int8())
        written = [path.name for path in write_report(run)]
        hostile = (run.path / "report.html").read_text()
    assert written == ["report.html", "heatmap.png"]
    assert [tag for tag, _ in Elements(hostile).elements] == [tag for tag, _ in Elements(clean).elements]
    assert HOSTILE in Elements(hostile).text
    assert "<script>window" not in hostile
    # Plotly reads a small HTML too: its texts hold the names escaped.
    for stored in re.findall(r'<script type="application/json">(.*?)</script>', hostile, re.S):
        assert "<img" not in json.dumps(json.loads(stored))


def test_the_same_run_gives_the_same_page(finished: RunDirectory) -> None:
    assert page(read_content(finished)) == page(read_content(finished))


def test_cells_of_the_heat_map(partial: RunDirectory) -> None:
    content = read_content(partial)
    blank, coloured = heat_map(content, content.sweeps[0]).data
    values = [value for row in coloured.z for value in row]
    assert len(values) == 12
    assert sum(value is not None for value in values) == 5
    # Row: name in module order; column: layer. The fifth component is layer 1's second.
    assert coloured.z[1][1] == pytest.approx((40 + 36 + 32 + 40) / 4)
    assert list(coloured.y)[1] == "mlp.up_proj"
    assert [value for row in blank.z for value in row].count(0) == 7
    hover = coloured.text[1][1]
    for words in (
        "model.layers.1.mlp.up_proj",
        "40 of 40",
        "mean FDT 37",
        "95% interval",
        "SDT 1",
        "DPPL 3.25",
    ):
        assert words in hover, words
    assert "ties inside the floor: 1 of 4" in hover
    assert "200 parameters" in hover
    assert "not measured yet" in coloured.text[2][3]
