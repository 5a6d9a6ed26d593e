"""Criteria beside each other: comparison.json, its figure and its table."""

from pathlib import Path
from typing import Any

import pytest
from made_plans import comparison_rows, harmed, write_comparison, written
from made_run import components, make_run, path_of, sweep
from page_text import figure_in, table_in

from dtm_fast.compression import Int8, effective_bits
from dtm_fast.errors import RunError
from dtm_fast.report import write_report
from dtm_fast.report.content import read_content
from dtm_fast.report.page import page
from dtm_fast.runs import RunDirectory


@pytest.fixture
def compared(partial: RunDirectory) -> RunDirectory:
    write_comparison(partial)
    return partial


def test_what_is_read(compared: RunDirectory) -> None:
    comparison = read_content(compared).comparison
    assert comparison is not None
    assert comparison.treatments == ["int8"]
    # The criteria as they come, the choices by size.
    assert list(comparison.chosen) == ["kl", "fdt", "gradient"]
    small, large = comparison.chosen["fdt"]
    assert (small.budget, large.budget) == (9, 15)
    assert len(small.measurement.configuration) == 9
    # [10, 100 k] in int8 has 8 bits for each weight and 32 for each of 10 rows: the second to the tenth of the
    # components, three of 100, 200 and 300 weights each, of 2,400 in all.
    assert small.bits == (8 * 1800 + 9 * 320 + 16 * 600) / 2400
    assert large.bits == (8 * 600 + 3 * 320 + 16 * 1800) / 2400


def test_the_figure(compared: RunDirectory) -> None:
    figure = figure_in(page(read_content(compared)), "baselines")
    kl, gradient, fdt = figure["data"]
    assert [line["name"] for line in (kl, gradient, fdt)] == ["KL", "gradient", "<b>FDT</b>"]
    # The one that is shown off is drawn last and named first.
    assert fdt["legendrank"] < kl["legendrank"] < gradient["legendrank"]
    assert fdt["line"]["width"] > kl["line"]["width"]
    assert len({line["line"]["color"] for line in figure["data"]}) == 3
    assert len({line["marker"]["symbol"] for line in figure["data"]}) == 3
    # What predicts without measuring is dotted.
    assert [line["line"]["dash"] for line in figure["data"]] == ["solid", "dot", "solid"]
    assert fdt["x"] == [11.2, 14.4]
    # 2 * 24 / 9 tokens of harm: 40 less 2.67, 5.33, 8 and 1.33, rounded.
    assert fdt["y"][0] == (37 + 35 + 32 + 39) / 4
    assert fdt["text"][0].startswith(
        "<b>chosen by FDT</b><br>11.2 effective bits (budget 9)<br>mean FDT 35.75 (95% interval "
    )
    assert fdt["text"][0].endswith("<br>FDT<sub>75</sub> 37.5")


def test_the_table(compared: RunDirectory) -> None:
    found = page(read_content(compared))
    rows = table_in(found, "All choices as a table")
    assert len(rows) == 7
    assert rows[0][:4] == ["chosen by", "budget", "bits", "components"]
    assert rows[3][:6] == ["FDT", "9", "11.2", "9", "37.5", "35.75"]
    low, high = map(float, rows[3][6].split(" to "))
    assert low < 35.75 < high
    assert rows[3][7:] == ["2", f"{2.75 + 2 * 24 / 9 / 8:.4g}"]
    assert "What choosing by FDT buys" in found


def test_without_a_comparison_nothing_is_shown(partial: RunDirectory) -> None:
    assert read_content(partial).comparison is None
    assert "baselines" not in page(read_content(partial))


def test_a_criterion_cannot_become_markup(compared: RunDirectory) -> None:
    rows = [{**row, "by": f"<b onclick=x>{row['by']}"} for row in comparison_rows(compared)]
    written(compared, "comparison.json", {"rows": rows, "treatments": ["<b onclick=x>"]})
    found = page(read_content(compared))
    assert "<b onclick" not in found
    assert figure_in(found, "baselines")["data"][0]["name"] == "&lt;b onclick=x&gt;kl"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rows": []}, "it has no rows"),
        ({"rows": {}}, "{} is no list"),
        ({"rows": [3]}, "TypeError"),
        ({"rows": [{"by": "fdt", "budget": 9}]}, "'first_margin' is missing"),
        ({"treatments": "int8"}, "'int8' is no list"),
        ({"treatments": [None]}, "None is no text"),
    ],
)
def test_a_bad_comparison_is_refused(compared: RunDirectory, change: dict[str, Any], said: str) -> None:
    written(compared, "comparison.json", change)
    _refuses(compared, said)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"by": 7}, "7 is no text"),
        ({"budget": "small"}, "'small' is no number"),
        ({"budget": float("inf")}, "inf is not finite"),
        ({"completion": 8}, "a row is of 8 tokens, the run of 40"),
        ({"fdt": [1, 2, 3]}, "the fdt of a row is of [3] probes, the run of 4"),
        ({"fdt": [1, 2, 3, 41]}, "an FDT does not lie in 0 … 40"),
        ({"fdt": ["a", "b", "c", "d"]}, "Error"),
        ({"sdt": [1, 2]}, "the sdt of a row is of [2] probes"),
        ({"configuration": {"x": "int8"}}, "'x' is none of the components"),
        ({"configuration": {path_of(0, "mlp.up_proj"): "int7"}}, "no treatment 'int7'"),
    ],
)
def test_a_bad_row_is_refused(compared: RunDirectory, change: dict[str, Any], said: str) -> None:
    first, *rest = comparison_rows(compared)
    written(compared, "comparison.json", {"rows": [*rest, {**first, **change}]})
    _refuses(compared, said)


@pytest.mark.parametrize("text", ["", "[]", "null", "7"])
def test_a_comparison_that_is_none_is_refused(compared: RunDirectory, text: str) -> None:
    (compared.path / "comparison.json").write_text(text)
    _refuses(compared, "")


def test_the_base_may_be_chosen(tmp_path: Path) -> None:
    with make_run(tmp_path / "run") as directory:
        sweep(directory, [component["path"] for component in components()], Int8())
        row = {"by": "fdt", "budget": 16, **harmed({}, 0).to_json()}
        directory.write_json("comparison.json", {"treatments": ["int8"], "rows": [row]})
        comparison = read_content(directory).comparison
    assert comparison is not None
    assert comparison.chosen["fdt"][0].bits == effective_bits({"x": (1, 1)}, {}) == 16


def _refuses(directory: RunDirectory, said: str) -> None:
    with pytest.raises(RunError) as refused:
        write_report(directory)
    assert str(refused.value).startswith(f"{directory.path / 'comparison.json'}: ")
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)
