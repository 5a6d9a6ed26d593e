"""The plan's map: what each cell says, and the table beside it."""

import re
from pathlib import Path
from typing import Any

import pytest
from made_plans import write_beam, write_joint, write_rounds
from made_run import LAYERS, NAMES, components, make_run, measured, path_of, point_of, record, sweep
from page_text import figure_in, table_in

from dtm_fast.compression import Drop, Int4, Int8, Prune, SparseGPT, Treatment
from dtm_fast.plan import Plan
from dtm_fast.report.content import read_content
from dtm_fast.report.page import page
from dtm_fast.runs import RunDirectory


def map_of(directory: RunDirectory) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """The page, the blank cells and the coloured ones."""
    found = page(read_content(directory))
    blank, coloured = figure_in(found, "plan-map")["data"]
    return found, blank, coloured


def write_mixed(directory: RunDirectory, configuration: dict[str, Treatment]) -> None:
    joint = measured(configuration, [9, 8, 7, 6])
    record(directory, joint)
    point = point_of(directory, joint)
    plan = Plan(configuration, "by hand", {}, curve=[point], chosen=point)
    directory.write_json("plan.json", plan.to_json())


def test_sparsities(tmp_path: Path) -> None:
    with make_run(tmp_path / "run") as directory:
        write_rounds(directory)
        found, blank, coloured = map_of(directory)
    assert coloured["z"] == [[0.2] * LAYERS, [0.6] * LAYERS, [1.0] * LAYERS]
    assert (coloured["zmin"], coloured["zmax"]) == (0, 1)
    assert coloured["text"][1] == ["60"] * LAYERS
    assert coloured["x"] == list(range(LAYERS))
    assert coloured["y"] == list(NAMES)
    assert {cell for row in blank["z"] for cell in row} == {None}
    # [10, 20] of which 80 are kept: (200 + 16 * 80) / 200 bits.
    assert coloured["hovertext"][1][2] == (
        "<b>model.layers.2.mlp.up_proj</b><br>prune(0.6)<br>7.4 bits a weight<br>"
        "after each round: 30%, 45%, 60%<br>200 parameters"
    )
    rows = table_in(found, "The plan as a table: 12 treated components")
    assert rows[0] == ["component", "treatment", "bits a weight", "sparsity after each round"]
    assert rows[2] == ["model.layers.0.mlp.up_proj", "prune(0.6)", "7.4", "30%, 45%, 60%"]
    assert len(rows) == 13
    assert 'class="keys"' not in found


@pytest.mark.parametrize(
    ("treatment", "sparsity"),
    [
        (Prune("2:4", "wanda"), 0.5),
        (Prune("1:4"), 0.75),
        (Prune(1), 1),
        (SparseGPT(0.3), 0.3),
        (SparseGPT("1:2"), 0.5),
    ],
)
def test_what_is_a_sparsity(tmp_path: Path, treatment: Treatment, sparsity: float) -> None:
    kept = path_of(1, NAMES[2])
    with make_run(tmp_path / "run") as directory:
        write_mixed(directory, {c["path"]: treatment for c in components() if c["path"] != kept})
        found, blank, coloured = map_of(directory)
    assert coloured["z"][2] == [sparsity, None, sparsity, sparsity]
    assert blank["z"][2] == [None, 0, None, None]
    assert blank["text"][2][1] == f"<b>{kept}</b><br>kept"
    assert "kept whole: 1" in found


def test_treatments(tmp_path: Path) -> None:
    with make_run(tmp_path / "run") as directory:
        sweep(directory, [component["path"] for component in components()], Int8())
        write_joint(directory)
        found, blank, coloured = map_of(directory)
    # In depth order int8, int4(5) and prune(0.7) by turns, so each name has its own; the last two stay as they are.
    # [10, 10] in int8: 8 bits and 32 for each of 10 rows, 11.2 a weight; int4 in groups of 5: 4 + 20 / 5 = 8;
    # [10, 30] of which 90 are kept: 300 + 16 * 90, 5.8 a weight.
    assert coloured["z"] == [[0, 0, 0, 0], [1, 1, 1, None], [2, 2, 2, None]]
    assert coloured["text"] == [["A"] * 4, ["B"] * 3 + [""], ["C"] * 3 + [""]]
    assert blank["z"] == [[None] * 4, [None] * 3 + [0], [None] * 3 + [0]]
    # Each place has a colour of its own, from its lower to its upper end.
    assert (coloured["zmin"], coloured["zmax"]) == (-0.5, 2.5)
    scale = [(round(at * 3, 6), colour) for at, colour in coloured["colorscale"]]
    assert [at for at, _ in scale] == [0, 1, 1, 2, 2, 3]
    colours = [colour for _, colour in scale]
    assert colours[0::2] == colours[1::2]
    assert len(set(colours)) == 3
    legend = found[found.index('class="keys"') :].split("</p>")[0]
    names = ("int8: 4", "int4(5): 3", "prune(0.7): 3")
    for letter, colour, name in zip("ABC", colours[::2], names, strict=True):
        assert re.search(
            rf'style="background:{colour};[^"]*">{letter}</span> {re.escape(name)}</span>', legend
        )
    assert "kept: 2" in legend
    # int8 was measured alone: the first component harms nothing.
    assert coloured["hovertext"][0][0] == (
        "<b>model.layers.0.self_attn.q_proj</b><br>int8<br>11.2 bits a weight<br><i>alone:</i><br>"
        "FDT<sub>75</sub> 40 of 40 tokens<br>mean FDT 40 (95% interval 40 to 40)<br>SDT 0<br>DPPL 2.75<br>"
        "ties inside the floor: 0 of 4 probes<br>100 parameters"
    )
    assert "alone" not in coloured["hovertext"][1][0]
    rows = table_in(found, "The plan as a table: 10 treated components")
    assert rows[0][-3:] == ["FDT<sub>75</sub> alone", "mean FDT alone", "95% interval"]
    assert rows[1] == ["model.layers.0.self_attn.q_proj", "int8", "11.2", "40", "40", "40 to 40"]
    assert rows[2][-3:] == ["", "", ""]


def test_one_treatment_needs_no_letters(tmp_path: Path) -> None:
    with make_run(tmp_path / "run") as directory:
        write_beam(directory)
        found, _, coloured = map_of(directory)
    assert {cell for row in coloured["text"] for cell in row} == {""}
    legend = found[found.index('class="keys"') :].split("</p>")[0]
    assert "int8: 8" in legend
    assert "kept: 4" in legend


def test_prunings_of_several_kinds_are_told_apart(tmp_path: Path) -> None:
    paths = [component["path"] for component in components()]
    with make_run(tmp_path / "run") as directory:
        write_mixed(directory, {paths[0]: Prune(0.5), paths[1]: SparseGPT(0.5), paths[2]: Drop()})
        found, _, coloured = map_of(directory)
    # Drop has 0 bits; the other two have equally many for a weight, and stand by name.
    assert [row[0] for row in coloured["text"]] == ["A", "B", "C"]
    assert all(name in found for name in ("prune(0.5): 1", "sparsegpt(0.5): 1", "drop: 1", "kept: 9"))


def test_what_is_treated_together_says_what_it_does_together(tmp_path: Path) -> None:
    names = ("self_attn.q_proj", "self_attn.k_proj")
    pair = {path_of(0, name): Int4(5) for name in names}
    with make_run(tmp_path / "run", components(names, 2)) as directory:
        record(directory, measured(pair, [30, 20, 10, 40]))
        write_mixed(directory, {**pair, path_of(1, names[0]): Int8()})
        _, _, coloured = map_of(directory)
    assert "<i>alone, with k_proj:</i><br>" in coloured["hovertext"][0][0]
    assert "mean FDT 25 " in coloured["hovertext"][1][0]


def test_a_layer_without_a_component_is_grey(tmp_path: Path) -> None:
    listed = [*components(NAMES[:2], 1), *[c for c in components(NAMES, 2) if c["layer"] == 1]]
    with make_run(tmp_path / "run", listed) as directory:
        write_mixed(directory, {listed[0]["path"]: Int8(), listed[4]["path"]: Int8()})
        found, blank, coloured = map_of(directory)
    place = coloured["y"].index(NAMES[2])
    assert coloured["z"][place] == [None, 0]
    assert blank["z"][place] == [None, None]
    assert "no such component" in found


@pytest.mark.parametrize(("layers", "texts", "room"), [(40, {"50", "25"}, 22), (41, {""}, 6)])
def test_many_layers_have_no_numbers(tmp_path: Path, layers: int, texts: set[str], room: int) -> None:
    listed = components(NAMES[:2], layers)
    with make_run(tmp_path / "run", listed) as directory:
        write_mixed(
            directory, {c["path"]: Prune(0.5 if place % 2 else 0.25) for place, c in enumerate(listed)}
        )
        found, _, coloured = map_of(directory)
    assert {cell for row in coloured["text"] for cell in row} == texts
    assert f"min-width:{130 + room * layers}px" in found


def test_many_layers_have_letters(tmp_path: Path) -> None:
    listed = components(NAMES[:2], 80)
    with make_run(tmp_path / "run", listed) as directory:
        write_mixed(directory, {c["path"]: Int8() if place % 2 else Drop() for place, c in enumerate(listed)})
        found, _, coloured = map_of(directory)
    assert {cell for row in coloured["text"] for cell in row} == {"A", "B"}
    assert f"min-width:{130 + 12 * 80}px" in found


def test_no_map_without_a_plan(partial: RunDirectory) -> None:
    assert "plan-map" not in page(read_content(partial))
