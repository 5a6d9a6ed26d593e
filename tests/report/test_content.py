"""What a report says, gathered from made-up runs."""

from pathlib import Path

import pytest
import torch
from made_run import N, components, make_run, measured, path_of, record, sweep, write_plan

from dtm_fast.compression import Int8, Prune
from dtm_fast.errors import InputError, RunError
from dtm_fast.report import write_report
from dtm_fast.report.content import read_content
from dtm_fast.report.headlines import headline
from dtm_fast.runs import RunDirectory


def test_a_finished_run(finished: RunDirectory) -> None:
    content = read_content(finished)
    (found,) = content.sweeps
    paths = [component["path"] for component in components()]
    assert found.treatment == "int8"
    assert list(found.measured) == paths
    assert found.ranked == paths
    assert found.harmless == 1
    (curve,) = content.curves
    assert [point.components for point in curve.points] == [3, 6, 9]
    assert curve.chosen is curve.points[1]
    # Sizes 100, 200, 300 in each of four layers: the first six are half.
    assert curve.chosen.share == pytest.approx(0.5)
    assert curve.chosen.fdt == pytest.approx((34 + 28 + 34 + 40) / 4)
    assert curve.chosen.fdt_interval[0] < curve.chosen.fdt < curve.chosen.fdt_interval[1]
    assert content.measurements == 12 + 3
    assert content.seconds == pytest.approx(15 * 1.5)
    # The last component's mean, (40 + 29 + 18 + 40) / 4, is the lowest.
    assert content.fdt_range == (31.75, N)


def test_headline_with_a_least_fdt(finished: RunDirectory) -> None:
    (sentence,) = headline(read_content(finished))
    assert sentence.startswith("6 of 12 components (50% of their parameters) can be converted to int8")
    assert "FDT_75 ≥ 30: FDT_75 is then 35.5 of 40 tokens, the mean FDT 34." in sentence


def test_headline_without_a_stop_names_the_ceiling(tmp_path: Path) -> None:
    paths = [component["path"] for component in components()]
    with make_run(tmp_path / "run") as directory:
        sweep(directory, paths, Int8())
        write_plan(directory, paths, sizes=(2, 12), chosen=12)
        record(directory, measured(dict.fromkeys(paths[:2], Int8()), [N, 20, N, N]))
        (sentence,) = headline(read_content(directory))
    assert sentence.startswith("With all 12 components converted to int8, FDT_75 is 31 of 40 tokens")
    assert "Up to 2 components (12% of their parameters) FDT_75 stays at its ceiling of 40." in sentence


def test_headline_of_an_empty_plan(tmp_path: Path) -> None:
    paths = [component["path"] for component in components()]
    with make_run(tmp_path / "run") as directory:
        sweep(directory, paths, Int8())
        write_plan(directory, paths, sizes=(10,), chosen=0, min_fdt=39.0)
        content = read_content(directory)
        write_report(directory)
    assert headline(content) == ["No component can be converted with FDT_75 ≥ 39: the plan is empty."]
    assert content.curves[0].chosen is None


def test_a_partial_run(partial: RunDirectory) -> None:
    content = read_content(partial)
    assert content.plan is None
    assert content.curves == []
    (sentence,) = headline(content)
    assert sentence == (
        "Unfinished: 5 of 12 components are measured alone under int8; 1 of them change no text, "
        f"and {path_of(1, 'mlp.up_proj')} harms most (mean FDT 37 of 40 tokens)."
    )
    assert [path.name for path in write_report(partial)] == ["report.html", "heatmap.png"]


def test_an_empty_journal_says_so(tmp_path: Path) -> None:
    with make_run(tmp_path / "run") as directory:
        with pytest.raises(InputError, match="nothing to report: no component has been measured"):
            write_report(directory)
        # The base itself is no component.
        record(directory, measured({}, [N] * 4))
        with pytest.raises(RunError, match="nothing to report"):
            write_report(directory)
        assert not (directory.path / "report.html").exists()


def test_a_run_without_settings_says_so(partial: RunDirectory) -> None:
    (partial.path / "run.json").unlink()
    with pytest.raises(RunError, match=r"no run\.json"):
        read_content(partial)
    partial.write_json("run.json", {"model": {"name": "x"}})
    with pytest.raises(
        RunError, match=r"run\.json: not the setting of a run of dtm_fast: 'probes' is missing"
    ):
        read_content(partial)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s["components"][0].update(layer=[1]), r"\[1\] is no whole number"),
        (lambda s: s["components"][2].update(layer=None), "None is no whole number"),
        (lambda s: s["components"][1].update(name=1), "1 is no text"),
        (lambda s: s["model"].update(name=1), "1 is no text"),
        (lambda s: s["command"].append(float("nan")), "nan is no text"),
        (lambda s: s["probes"].update(count="4"), "'4' is no whole number"),
    ],
)
def test_settings_of_wrong_kinds_are_refused(partial: RunDirectory, change, said: str) -> None:
    stored = partial.read_json("run.json")
    change(stored)
    partial.write_json("run.json", stored)
    with pytest.raises(RunError, match=rf"run\.json: not the setting of a run of dtm_fast: {said}"):
        write_report(partial)


def test_a_picture_of_an_earlier_search_does_not_stay(partial: RunDirectory) -> None:
    (partial.path / "curve.png").write_bytes(b"of another plan")
    write_report(partial)
    assert not (partial.path / "curve.png").exists()


def test_a_component_that_the_model_lacks_is_refused(partial: RunDirectory) -> None:
    record(partial, measured({"model.layers.9.mlp.up_proj": Int8()}, [1, 2, 3, 4]))
    with pytest.raises(RunError, match=r"model\.layers\.9\.mlp\.up_proj was measured"):
        read_content(partial)


def test_rows_of_one_configuration_are_merged(tmp_path: Path) -> None:
    path = path_of(0, "mlp.up_proj")
    dppl = torch.tensor([2.0, 3.0, 4.0, 5.0], dtype=torch.float64)
    kl = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    with make_run(tmp_path / "run") as directory:
        record(directory, measured({path: Int8()}, [3, 9, N, N], dppl=dppl), ["dppl"])
        record(directory, measured({path: Int8()}, [3, 9, N, N], kl=kl), ["kl"])
        content = read_content(directory)
    (merged,) = content.sweeps[0].measured.values()
    assert merged.dppl is not None
    assert torch.equal(merged.dppl, dppl)
    assert merged.kl is not None
    assert torch.equal(merged.kl, kl)
    assert content.measurements == 2
    assert content.seconds == pytest.approx(3.0)


def test_several_treatments_and_joint_rows_without_a_plan(tmp_path: Path) -> None:
    paths = [component["path"] for component in components()]
    with make_run(tmp_path / "run") as directory:
        sweep(directory, paths[:3], Prune(0.5))
        sweep(directory, paths, Int8())
        record(directory, measured(dict.fromkeys(paths[:4], Int8()), [9, 8, 7, 6]))
        record(directory, measured(dict.fromkeys(paths[:2], Int8()), [N, 8, 7, 6]))
        # Of two treatments at once there is no curve.
        record(directory, measured({paths[0]: Int8(), paths[1]: Prune(0.5)}, [5, 8, 7, 6]))
        content = read_content(directory)
        written = [path.name for path in write_report(directory)]
    assert [(s.treatment, len(s.measured)) for s in content.sweeps] == [("prune(0.5)", 3), ("int8", 12)]
    assert [c.treatment for c in content.curves] == ["int8"]
    assert [point.components for point in content.curves[0].points] == [2, 4]
    assert written == ["report.html", "heatmap.png", "curve.png"]


def test_joint_rows_of_another_order_are_not_on_the_plans_curve(finished: RunDirectory) -> None:
    paths = [component["path"] for component in components()]
    record(finished, measured(dict.fromkeys(paths[3:9], Int8()), [1, 2, 3, 4]))
    assert [point.components for point in read_content(finished).curves[0].points] == [3, 6, 9]


def test_layers_that_differ_keep_module_order(tmp_path: Path) -> None:
    listed = [
        *components(("mixer.in_proj", "mlp.up_proj"), 1),
        *[
            c
            for c in components(("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj"), 2)
            if c["layer"] == 1
        ],
    ]
    with make_run(tmp_path / "run", listed) as directory:
        sweep(directory, [listed[0]["path"], listed[2]["path"]], Int8())
        content = read_content(directory)
        write_report(directory)
    assert content.setting.layers == [0, 1]
    assert content.setting.names == ["self_attn.q_proj", "self_attn.o_proj", "mixer.in_proj", "mlp.up_proj"]


def test_nothing_diverges_still_has_a_colour_scale(tmp_path: Path) -> None:
    with make_run(tmp_path / "run") as directory:
        record(directory, measured({path_of(0, "mlp.up_proj"): Int8()}, [N] * 4))
        content = read_content(directory)
        write_report(directory)
    assert content.fdt_range == (N - 1, N)
    assert headline(content)[0].endswith("none changes any of the texts.")
