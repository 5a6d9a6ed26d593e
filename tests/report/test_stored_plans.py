"""plan.json as a report reads it: what each search says, and what is refused with one line that names the file."""

from pathlib import Path
from typing import Any

import pytest
from made_plans import write_beam, write_joint, write_rounds, written
from made_run import components, make_run, path_of

from dtm_fast.compression import Int4, Int8
from dtm_fast.errors import InputError
from dtm_fast.report import write_report
from dtm_fast.report.content import read_content
from dtm_fast.report.searches import Beam, InOrder, Joint, Rounds
from dtm_fast.runs import RunDirectory


def test_a_plan_in_order(finished: RunDirectory) -> None:
    search = read_content(finished).search
    assert isinstance(search, InOrder)
    assert (search.treatment, search.ranked_by) == ("int8", "fdt75")
    assert search.order == [component["path"] for component in components()]
    assert (search.components, search.share, search.min_fdt) == (None, None, 30.0)


def test_pruning_rounds(tmp_path: Path) -> None:
    with make_run(tmp_path / "run") as directory:
        write_rounds(directory)
        content = read_content(directory)
    search = content.search
    assert isinstance(search, Rounds)
    assert search.levels == [38, 35, 32]
    # In each of four layers 100, 200 and 300 weights, in the end pruned to 20, 60 and 100%.
    assert search.sparsities[0][path_of(3, "mlp.up_proj")] == 0.3
    assert search.mean_sparsities(content.setting) == pytest.approx([220 / 600, 330 / 600, 440 / 600])
    assert search.steps == pytest.approx([220 / 600, 110 / 600, 110 / 600])
    # What the round probed, by FDT alone, is a sweep as well; the joint configurations are no curve.
    assert [(s.treatment, len(s.measured)) for s in content.sweeps] == [("prune(0.3)", 12)]
    assert content.curves == []
    assert content.planned is not None
    assert content.planned.fdt.tolist() == [26, 13, 0, 33]
    assert content.measurements == 12 + 3


def test_a_beam(tmp_path: Path) -> None:
    with make_run(tmp_path / "run") as directory:
        write_beam(directory, (Int8(), Int4(5)))
        content = read_content(directory)
    assert content.search == Beam(["int8", "int4(5)"], 3, "fdt75", 5, 12)
    assert [sweep.treatment for sweep in content.sweeps] == ["int8", "int4(5)"]
    assert content.curves == []
    # All rows are counted, also those that nothing shows.
    assert content.measurements == 24 + 8 + 8
    assert content.seconds == pytest.approx(40 * 1.5)


def test_a_joint_search(tmp_path: Path) -> None:
    with make_run(tmp_path / "run") as directory:
        plan = write_joint(directory)
        content = read_content(directory)
    search = content.search
    assert isinstance(search, Joint)
    assert (search.budgets, search.units, search.refinements) == ([10.0, 15.5], 12, 1)
    assert search.reached[0] == plan.chosen
    # Four on the front, ten worse ones, two by FDT alone.
    assert len(content.dots) == 16
    assert [dot.sdt is None for dot in content.dots].count(True) == 2
    assert {(dot.bits, dot.fdt) for dot in content.dots} >= {(point.bits, point.fdt) for point in plan.curve}
    assert content.curves == []


def test_a_search_that_is_not_known_has_a_map_all_the_same(tmp_path: Path) -> None:
    with make_run(tmp_path / "run") as directory:
        write_beam(directory)
        written(directory, "plan.json", {"search": "by hand", "how": {}})
        content = read_content(directory)
        page = write_report(directory)[0].read_text()
    assert content.search is None
    assert "The plan, component by component" in page
    assert "<dt>plan</dt><dd>by hand</dd>" in page
    assert "With 8 of 12 components" in page


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": 1}, "plan: format 1, this dtm_fast reads 2"),
        ({"configuration": {"model.layers.9.mlp": "int8"}}, "'model.layers.9.mlp' is none of the components"),
        ({"configuration": {path_of(0, "mlp.up_proj"): "int7"}}, "no treatment 'int7'"),
        ({"curve": [{"components": 1}]}, "not a plan of dtm_fast: plan: a point has bits, components,"),
        ({"chosen": None}, "it is not empty, but has no point of its own"),
        ({"how": {}}, "'rounds' is missing"),
        ({"how": []}, "its how holds no names and values"),
        ({"how": {"steps": [0.2], "rounds": []}}, "0 rounds, but 3 points"),
        ({"curve": [], "how": {"steps": [], "rounds": []}}, "0 rounds, but 0 points"),
        ({"search": "in order"}, "'stop' is missing"),
        ({"search": "beam"}, "'treatments' is missing"),
        ({"search": "joint"}, "'reached' is missing"),
        ({"search": 3}, "its search, model or calibration is no text"),
    ],
)
def test_a_bad_plan_is_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    with make_run(tmp_path / "run") as directory:
        write_rounds(directory)
        written(directory, "plan.json", change)
        _refuses(directory, said)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("level", "high", "'high' is no number"),
        ("level", float("nan"), "nan is not finite"),
        ("sparsities", [0.5], "AttributeError"),
        ("sparsities", {path_of(0, "mlp.up_proj"): 1.5}, "1.5 does not lie in 0 … 1"),
        ("sparsities", {"x": 0.5}, "'x' is none of the components"),
        ("step", None, "None is no number"),
    ],
)
def test_a_bad_round_is_refused(tmp_path: Path, name: str, value: Any, said: str) -> None:
    with make_run(tmp_path / "run") as directory:
        how = write_rounds(directory).how
        how["rounds"][1][name] = value
        written(directory, "plan.json", {"how": how})
        _refuses(directory, said)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"budgets": []}, "0 budgets, but 2 points"),
        ({"budgets": [9, True]}, "True is no number"),
        ({"units": -1}, "-1 is no whole number of at least 0"),
        ({"treatments": "int8"}, "'int8' is no list"),
        ({"treatments": [8]}, "8 is no text"),
        ({"reached": [{}, {}]}, "a point has bits, components, dppl, fdt, fdt75, sdt, share; not {}"),
    ],
)
def test_a_bad_joint_plan_is_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    with make_run(tmp_path / "run") as directory:
        written(directory, "plan.json", {"how": {**write_joint(directory).how, **change}})
        _refuses(directory, said)


@pytest.mark.parametrize("value", ["many", None, [1]])
def test_a_point_that_is_no_number_is_refused(tmp_path: Path, value: Any) -> None:
    with make_run(tmp_path / "run") as directory:
        chosen = write_beam(directory).to_json()["chosen"]
        written(directory, "plan.json", {"chosen": {**chosen, "fdt": value}})
        _refuses(directory, "is no number")


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "null"])
def test_a_plan_that_is_none_is_refused(finished: RunDirectory, text: str) -> None:
    (finished.path / "plan.json").write_text(text)
    _refuses(finished, "")


def _refuses(directory: RunDirectory, said: str) -> None:
    with pytest.raises(InputError) as refused:
        write_report(directory)
    assert str(refused.value).startswith(f"{directory.path / 'plan.json'}: ")
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not (directory.path / "report.html").exists()
