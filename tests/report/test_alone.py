"""Components alone: measured by FDT only, together with others, or not all."""

from pathlib import Path

import pytest
from made_plans import without
from made_run import N, components, fdt_of, make_run, measured, path_of, record
from page_text import Elements, table_in

from dtm_fast.compression import Int8, Prune
from dtm_fast.errors import RunError
from dtm_fast.report.content import read_content
from dtm_fast.report.figures import heat_map
from dtm_fast.report.headlines import headline
from dtm_fast.report.page import page
from dtm_fast.runs import RunDirectory

PATHS = [component["path"] for component in components()]
NAMES = ("self_attn.k_proj", "self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj")


def test_all_components_by_fdt_alone_are_a_sweep(tmp_path: Path) -> None:
    with make_run(tmp_path / "run") as directory:
        for place, path in enumerate(PATHS):
            # Of equal FDT_75 (all are 40) the mean decides; of equal means the name.
            record(directory, without(measured({path: Int8()}, fdt_of(place // 2)), "sdt"))
        content = read_content(directory)
        read = Elements(page(content))
    (sweep,) = content.sweeps
    pairs = zip(PATHS[0::2], PATHS[1::2], strict=True)
    assert sweep.ranked == [path for pair in pairs for path in sorted(pair)]
    assert sweep.harmless == 2
    assert "SDT" not in heat_map(content, sweep).data[1].text[0][0]
    assert headline(content)[0].startswith("All 12 components are measured alone under int8")
    assert read.count("tr") == 13


def test_some_components_by_fdt_alone_are_none(tmp_path: Path) -> None:
    with make_run(tmp_path / "run") as directory:
        for path in PATHS[:11]:
            record(directory, without(measured({path: Prune(0.5)}, [N, 8, 7, 6]), "sdt"))
        with pytest.raises(RunError, match="no component has been measured yet"):
            read_content(directory)
        record(directory, measured({PATHS[4]: Prune(0.5)}, [N, 8, 7, 6]), ["kl"])
        content = read_content(directory)
    assert list(content.sweeps[0].measured) == [PATHS[4]]
    # It is known all the same, for whatever else shows the component.
    assert (PATHS[0], "prune(0.5)") in content.alone
    assert content.measurements == 12


def test_rows_of_fdt_alone_take_nothing_away(tmp_path: Path) -> None:
    complete = measured({PATHS[0]: Int8()}, [3, 9, N, N])
    with make_run(tmp_path / "run") as directory:
        record(directory, complete, ["dppl"])
        record(directory, without(complete, "sdt"))
        (sweep,) = read_content(directory).sweeps
    assert sweep.measured[PATHS[0]].sdt is not None


@pytest.fixture
def fused(tmp_path: Path) -> RunDirectory:
    """Of two layers q and k measured as one, everything else alone; and joint configurations."""
    listed = components(NAMES, 2)
    with make_run(tmp_path / "run", listed) as directory:
        for layer in range(2):
            pair = dict.fromkeys((path_of(layer, NAMES[0]), path_of(layer, NAMES[1])), Int8())
            record(directory, measured(pair, [N, N - 4 * layer - 4, N, N]))
            for place, name in enumerate(NAMES[2:]):
                record(directory, measured({path_of(layer, name): Int8()}, [N, N - place, N, N]))
            # In the same module, but o_proj was measured by itself.
            record(directory, measured({**pair, path_of(layer, NAMES[2]): Int8()}, [1, 2, 3, 4]))
        yield directory


def test_what_is_treated_together_is_measured_together(fused: RunDirectory) -> None:
    content = read_content(fused)
    (sweep,) = content.sweeps
    assert len(sweep.measured) == 8
    assert sweep.fused
    assert sweep.measured[path_of(1, NAMES[0])] is sweep.measured[path_of(1, NAMES[1])]
    assert sweep.measured[path_of(1, NAMES[0])].fdt.tolist() == [N, N - 8, N, N]
    # k stands for q and k; o_proj harms nothing and up_proj one token.
    assert sweep.ranked == [
        path_of(0, NAMES[2]),
        path_of(1, NAMES[2]),
        path_of(0, NAMES[3]),
        path_of(1, NAMES[3]),
        path_of(0, NAMES[0]),
        path_of(1, NAMES[0]),
    ]
    assert content.curves == []
    assert "<br>together with q_proj<br>" in heat_map(content, sweep).data[1].text[0][1]


def test_what_was_measured_together_is_one_row(fused: RunDirectory) -> None:
    content = read_content(fused)
    found = page(content)
    rows = table_in(found, "All 6 measured sets")
    assert rows[-1][1] == "model.layers.1.self_attn.k_proj, q_proj"
    # Of [10, 10] and [10, 20] weights.
    assert rows[-1][-1] == "300"
    assert "Components that are treated together were measured together" in found
    assert headline(content) == [
        "All 8 components are measured alone under int8; 2 of them change no text, and "
        "model.layers.1.self_attn.k_proj, q_proj harms most (mean FDT 38 of 40 tokens)."
    ]


def test_joint_configurations_that_do_not_grow_are_no_curve(tmp_path: Path) -> None:
    with make_run(tmp_path / "run") as directory:
        record(directory, measured(dict.fromkeys(PATHS[:4], Int8()), [9, 8, 7, 6]))
        record(directory, measured(dict.fromkeys(PATHS[2:5], Int8()), [N, 8, 7, 6]))
        assert read_content(directory).curves == []
        record(directory, measured(dict.fromkeys(PATHS[:2], Prune(0.5)), [9, 8, 7, 6]))
        record(directory, measured(dict.fromkeys(PATHS[:3], Prune(0.5)), [8, 8, 7, 6]))
        (curve,) = read_content(directory).curves
    assert curve.treatment == "prune(0.5)"
    assert [point.components for point in curve.points] == [2, 3]
