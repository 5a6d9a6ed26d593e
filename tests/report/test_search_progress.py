"""How a search went: what its figures and its table say, against what the made-up search measured."""

from pathlib import Path

import pytest
from made_plans import write_beam, write_joint, write_rounds
from made_run import N, make_run
from page_text import figure_in, figures_in, table_in

from dtm_fast.compression import Prune
from dtm_fast.errors import InputError
from dtm_fast.report.content import read_content
from dtm_fast.report.headlines import headline
from dtm_fast.report.page import page


def test_rounds_over_mean_sparsity(tmp_path: Path) -> None:
    with make_run(tmp_path / "run") as directory:
        write_rounds(directory)
        found = page(read_content(directory))
    # In each of four layers 100, 200 and 300 weights, in the end pruned to 20, 60 and 100%.
    shares = pytest.approx([100 * 220 / 600, 100 * 330 / 600, 100 * 440 / 600])
    level, mean, fdt75, *diamonds = figure_in(found, "progress-fdt")["data"]
    assert [line["x"] for line in (level, mean, fdt75)] == [shares] * 3
    assert level["name"] == "level"
    assert level["y"] == [38, 35, 32]
    # Harm by 9, 18 and 27 tokens: N less 0.5, 1, 1.5 and 0.25 times as much, rounded, on the four probes.
    probes = [[36, 31, 26, 38], [31, 22, 13, 36], [26, 13, 0, 33]]
    assert mean["y"] == [sum(each) / 4 for each in probes]
    # Of four values the 75th percentile lies a quarter of the way from the second largest to the largest.
    assert fdt75["y"] == [36.5, 32.25, 27.75]
    assert [(each["name"], each["x"], each["y"]) for each in diamonds] == [
        ("the plan", pytest.approx([100 * 440 / 600]), [27.75]),
        ("the plan", pytest.approx([100 * 440 / 600]), [18]),
    ]
    assert fdt75["text"][1] == "round 2 of 3<br>mean sparsity 55%<br>FDT<sub>75</sub> 32.25"
    sdt = figure_in(found, "progress-sdt")["data"][0]
    assert sdt["y"] == [2, 2, 2]
    # 2, 2.5, 3 and 3.5 and an eighth of the harm.
    dppl = figure_in(found, "progress-dppl")
    assert dppl["data"][0]["y"] == [2.75 + 9 / 8, 2.75 + 18 / 8, 2.75 + 27 / 8]
    assert "type" not in dppl["layout"]["yaxis"]
    rows = table_in(found, "These points as a table")
    assert rows[0][:4] == ["round", "added", "mean sparsity", "level"]
    # After the first round 10, 60 and 150 of 600 weights are gone: a bit for each weight, 16 for each that is kept.
    assert rows[1] == ["1", "36.7%", "36.7%", "38", "11.13", "36.5", "32.75", "2", "3.875"]
    assert "Round by round" in found


def test_rounds_beside_uniform_pruning(tmp_path: Path) -> None:
    with make_run(tmp_path / "run") as directory:
        stored = write_rounds(directory).to_json()
        worse = [{**point, "fdt": point["fdt"] - 5, "sdt": point["sdt"] + 3} for point in stored["curve"]]
        worse[2] |= {"dppl": 5000.0, "fdt75": 11.5}
        stored["how"]["uniform"] = worse
        directory.write_json("plan.json", stored)
        content = read_content(directory)
        found = page(content)
    lines = {each["name"]: each for each in figure_in(found, "progress-fdt")["data"]}
    assert lines["mean FDT, uniform"]["y"] == [value - 5 for value in lines["mean FDT"]["y"]]
    assert lines["mean FDT, uniform"]["x"] == lines["mean FDT"]["x"]
    assert figure_in(found, "progress-sdt")["data"][1]["y"] == [5, 5, 5]
    assert figure_in(found, "progress-dppl")["layout"]["yaxis"]["type"] == "log"
    rows = table_in(found, "These points as a table")
    assert rows[0][9:] == ["uniform: FDT<sub>75</sub>", "uniform: mean FDT", "uniform: SDT", "uniform: DPPL"]
    assert rows[3][9:] == ["11.5", "13", "5", "5,000"]
    assert "Uniform: the same mean sparsity, every component alike." in found
    assert headline(content)[0].endswith(
        " Pruned uniformly, FDT_75 is 11.5 of 40 tokens and the mean FDT 13."
    )


def test_rounds_beside_another_number_of_uniform_points_are_refused(tmp_path: Path) -> None:
    with make_run(tmp_path / "run") as directory:
        stored = write_rounds(directory).to_json()
        stored["how"]["uniform"] = stored["curve"][:2]
        directory.write_json("plan.json", stored)
        with pytest.raises(InputError, match="3 rounds, but 2 uniform points"):
            read_content(directory)


def test_a_ruined_model_has_a_scale_by_powers(tmp_path: Path) -> None:
    with make_run(tmp_path / "run") as directory:
        stored = write_rounds(directory).to_json()
        stored["curve"][2]["dppl"] = stored["chosen"]["dppl"] = 123456.7
        directory.write_json("plan.json", stored)
        found = page(read_content(directory))
    assert figure_in(found, "progress-dppl")["layout"]["yaxis"]["type"] == "log"
    assert table_in(found, "These points as a table")[3][-1] == "123,457"


def test_a_beam_over_its_depth(tmp_path: Path) -> None:
    with make_run(tmp_path / "run") as directory:
        plan = write_beam(directory)
        found = page(read_content(directory))
    mean, fdt75, at_fdt75, at_mean = figure_in(found, "progress-fdt")["data"]
    assert mean["x"] == fdt75["x"] == [1, 2, 3, 4, 5, 6, 7, 8]
    # A quarter of the probes agrees to the end at the first two depths; then the harm is 5, 7, …: 2.5, 5, 7.5, 1.25.
    assert fdt75["y"][:3] == [N, N, pytest.approx(38.25)]
    assert mean["y"][:3] == [(3 * N + N - 2) / 4, (3 * N + N - 4) / 4, (38 + 35 + 32 + 39) / 4]
    assert fdt75["text"][1].startswith("depth 2<br>2 of 12 components<br>12.5% of their parameters")
    assert plan.chosen is not None
    assert (at_fdt75["x"], at_fdt75["y"]) == ([8], [plan.chosen.fdt75])
    assert (at_mean["x"], at_mean["y"]) == ([8], [plan.chosen.fdt])
    rows = table_in(found, "These points as a table")
    assert [row[0] for row in rows] == ["depth", *"12345678"]
    assert rows[3][1:3] == ["3", "25.0%"]
    assert "Depth by depth" in found


def test_a_long_way_is_a_line_without_dots(tmp_path: Path) -> None:
    with make_run(tmp_path / "run") as directory:
        stored = write_beam(directory).to_json()
        directory.write_json("plan.json", {**stored, "curve": 8 * stored["curve"]})
        found = page(read_content(directory))
    assert {line["mode"] for line in figure_in(found, "progress-fdt")["data"][:2]} == {"lines"}


def test_the_front_over_size(tmp_path: Path) -> None:
    with make_run(tmp_path / "run") as directory:
        plan = write_joint(directory)
        found = page(read_content(directory))
    dots, line, diamond = figure_in(found, "progress-fdt")["data"]
    assert line["x"] == [point.bits for point in plan.curve]
    assert line["y"] == [point.fdt for point in plan.curve]
    # The best that is known of a size is that of the next smaller point.
    assert line["line"]["shape"] == "hv"
    assert len(dots["x"]) == 16
    assert set(zip(line["x"], line["y"], strict=True)) <= set(zip(dots["x"], dots["y"], strict=True))
    assert plan.chosen is not None
    assert (diamond["x"], diamond["y"]) == ([plan.chosen.bits], [plan.chosen.fdt])
    assert diamond["marker"]["symbol"] == "diamond"
    # Those of FDT alone have no other metric.
    for name in ("progress-sdt", "progress-dppl"):
        assert len(figure_in(found, name)["data"][0]["x"]) == 14
    rows = table_in(found, "These points as a table")
    # Four on the front, and what the other budget reached, which is not; the smallest first.
    assert len(rows) == 6
    assert [float(row[0]) for row in rows[1:]] == sorted(float(row[0]) for row in rows[1:])
    assert sorted(row[-1] for row in rows[1:]) == [
        "",
        "",
        "",
        "best within 10; the plan",
        "best within 15.5; not on the front",
    ]
    assert "What each size costs" in found


def test_a_plan_in_order_has_its_curve_instead(finished) -> None:
    names = figures_in(page(read_content(finished)))
    assert names == ["plan-map", "curve-fdt", "curve-sdt", "curve-dppl", "heat-map-0"]


def test_a_search_that_found_nothing_has_no_way(tmp_path: Path) -> None:
    with make_run(tmp_path / "run") as directory:
        stored = write_rounds(directory).to_json()
        directory.write_json("plan.json", {**stored, "configuration": {}, "chosen": None})
        assert figures_in(page(read_content(directory))) == ["heat-map-0"]


def test_without_sdt_and_dppl_there_is_fdt(tmp_path: Path) -> None:
    with make_run(tmp_path / "run") as directory:
        stored = write_beam(directory, (Prune(0.5),)).to_json()
        for point in (*stored["curve"], stored["chosen"]):
            point["sdt"] = point["dppl"] = None
        directory.write_json("plan.json", stored)
        found = page(read_content(directory))
    assert figures_in(found) == ["plan-map", "progress-fdt", "heat-map-0"]
    assert table_in(found, "These points as a table")[1][-2:] == ["", ""]
