import json
import re

import pytest
import tiny
import torch
from journal_rows import finished

import dtm_fast as dtm
from dtm_fast.measure import EXTRA_METRICS
from dtm_fast.plan import Plan

SMALL = ("--prefix", 8, "--completion", 12, "--probes", 4)


@pytest.fixture
def options(text_file) -> tuple:
    return ("--text", text_file, *SMALL)


@pytest.fixture
def noisy_folder(tmp_path, llama):
    """The same tiny Llama with some noise on every weight."""
    with torch.no_grad():
        for i, p in enumerate(llama.parameters()):
            p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
    return tiny.save(tmp_path / "noisy", llama)


def test_doctor_says_what_each_operation_uses(command):
    ended = command("doctor")
    assert (ended.code, ended.err) == (0, "")
    for operation in ("int8_linear", "masked_linear", "quantize_int8", "token_divergence"):
        assert operation in ended.out


def test_doctor_as_json(command):
    ended = command("doctor", "--json")
    assert ended.code == 0
    assert json.loads(ended.out) == json.loads(json.dumps(dtm.backend_info()))


@pytest.mark.parametrize("name", ["doctor", "evaluate", "sweep", "plan", "report"])
def test_every_command_has_help(command, name):
    ended = command(name, "--help")
    assert ended.code == 0
    assert name in ended.out


def test_without_a_command_there_is_help(command):
    ended = command()
    assert "Usage" in ended.out + ended.err


def test_a_model_against_itself(tiny_folder, command, options):
    ended = command("evaluate", tiny_folder, tiny_folder, *options, "--json")
    found = json.loads(ended.out)
    assert ended.code == 0
    assert set(found["summary"]) == {"fdt", "sdt", *EXTRA_METRICS}
    assert found["probes"]["fdt"] == [12] * 4
    assert found["probes"]["sdt"] == [0] * 4
    assert found["probes"]["kl"] == [0.0] * 4
    assert found["probes"]["agreement"] == [1.0] * 4
    assert (found["floor"]["divergent"], found["floor"]["positions"]) == (0, 48)


def test_a_model_against_one_that_was_changed(tiny_folder, noisy_folder, command, options):
    found = json.loads(command("evaluate", tiny_folder, noisy_folder, *options, "--json").out)
    assert found["summary"]["fdt"]["mean"] < 12
    assert found["summary"]["sdt"]["mean"] > 0
    assert found["summary"]["kl"]["mean"] > 0
    base, tokenizer = dtm.load_model(tiny_folder)
    other, _ = dtm.load_model(noisy_folder)
    text = (tiny_folder.parent / "text.txt").read_text()
    probes = dtm.Probes.from_text(base, tokenizer, text, 8, 12, 4)
    (expected,) = dtm.ReferenceEvaluator(other, probes, base=base).measure([{}], list(EXTRA_METRICS))
    found["probes"].pop("seconds")
    assert found["probes"] == {k: v for k, v in expected.to_json().items() if k != "seconds"}


def test_evaluate_for_a_person(tiny_folder, noisy_folder, command, options):
    ended = command("evaluate", tiny_folder, noisy_folder, *options)
    assert ended.code == 0
    for word in (
        "FDT",
        "SDT",
        "DPPL",
        "PERPLEXITY",
        "KL",
        "agreement",
        "95% interval",
        "Floor:",
    ):
        assert word in ended.out


@pytest.mark.parametrize(("asked", "code"), [(0, 0), (12, 1)])
def test_evaluate_ends_with_1_below_min_fdt(tiny_folder, noisy_folder, command, options, asked, code):
    ended = command("evaluate", tiny_folder, noisy_folder, *options, "--min-fdt", asked)
    assert ended.code == code
    assert len(ended.errors) == code
    assert all(re.fullmatch(r"error: FDT_75 is [\d.]+, lower than 12", line) for line in ended.errors)


def test_min_fdt_that_is_just_reached_is_reached(tiny_folder, command, options):
    assert command("evaluate", tiny_folder, tiny_folder, *options, "--min-fdt", 12).code == 0


def test_a_prefix_of_one_token_is_evaluated_without_its_metrics(tiny_folder, command, options):
    found = json.loads(command("evaluate", tiny_folder, tiny_folder, *options, "--prefix", 1, "--json").out)
    assert set(found["summary"]) == {"fdt", "sdt", "dppl", "kl"}


def test_a_sweep_measures_every_component(tiny_folder, tmp_path, command, options):
    ended = command("sweep", tiny_folder, "--run", tmp_path / "run", *options, "--json")
    found = json.loads(ended.out)
    model, _ = dtm.load_model(tiny_folder)
    assert ended.code == 0
    assert (found["treatment"], found["run"]) == ("int8", str(tmp_path / "run"))
    assert sorted(entry["component"] for entry in found["ranked"]) == sorted(dtm.components(model))
    order = [(-e["fdt"]["p75"], -e["fdt"]["mean"], e["sdt"]["mean"], e["component"]) for e in found["ranked"]]
    assert order == sorted(order)


def test_a_sweep_for_a_person(tiny_folder, tmp_path, command, options):
    ended = command("sweep", tiny_folder, "--run", tmp_path / "run", *options, "--treatment", "prune(0.5)")
    assert ended.code == 0
    assert "the least harmful first" in ended.out
    assert "Floor:" in ended.out
    assert "21/21" in ended.err


@pytest.mark.parametrize("by", ["dppl", "perplexity"])
def test_a_sweep_ranked_otherwise(tiny_folder, tmp_path, command, options, by):
    run = ("--run", tmp_path / "run", "--rank-by", by, "--treatment", "prune(0.5)")
    found = json.loads(command("sweep", tiny_folder, *run, *options, "--json").out)
    means = [entry[by]["mean"] for entry in found["ranked"]]
    assert means == sorted(means)


def test_a_plan_writes_its_files(tiny_folder, tmp_path, command, options):
    ended = command("plan", tiny_folder, "--run", tmp_path / "run", *options, "--components", 5, "--every", 2)
    assert ended.code == 0, ended.err
    plan = Plan.from_json(json.loads((tmp_path / "run" / "plan.json").read_text()))
    assert set(plan.configuration.values()) == {dtm.Int8()}
    assert list(plan.configuration) != []
    assert sorted(plan.configuration) == sorted(plan.how["order"][:5])
    assert [p.components for p in plan.curve] == [2, 4, 5]
    for name in ("plan.json", "report.html", "heatmap.png"):
        assert (tmp_path / "run" / name).stat().st_size > 0
        assert f"wrote {tmp_path / 'run' / name}" in ended.out


def test_the_plan_measured_is_the_plan_applied(tiny_folder, tmp_path, command, options):
    command("plan", tiny_folder, "--run", tmp_path / "run", *options, "--components", 5)
    plan = Plan.from_json(json.loads((tmp_path / "run" / "plan.json").read_text()))
    model, tokenizer = dtm.load_model(tiny_folder)
    probes = dtm.Probes.from_text(model, tokenizer, (tmp_path / "text.txt").read_text(), 8, 12, 4)
    (joint,) = dtm.ReferenceEvaluator(model, probes).measure([plan.configuration])
    assert plan.chosen.fdt75 == joint.summary("fdt").p75
    assert plan.chosen.sdt == joint.summary("sdt").mean


def test_run_json_says_how_it_was_run(tiny_folder, tmp_path, command, options):
    command("sweep", tiny_folder, "--run", tmp_path / "run", *options)
    said = json.loads((tmp_path / "run" / "run.json").read_text())
    assert said["command"][:3] == ["dtm-fast", "sweep", str(tiny_folder)]
    assert said["model"] == {
        "name": str(tiny_folder),
        "type": "LlamaForCausalLM",
        "dtype": "float32",
        "parameters": sum(p.numel() for p in tiny.model_of("llama").parameters()),
    }
    assert said["probes"] == {"text": str(tmp_path / "text.txt"), "count": 4, "prefix": 8, "completion": 12}
    assert len(said["components"]) == 21
    assert said["floor"]["positions"] == 48
    assert set(said["versions"]) == {"dtm_fast", "torch", "transformers"}


def test_the_same_command_again_measures_nothing_and_ends_in_the_same_plan(
    tiny_folder, tmp_path, command, options
):
    arguments = ("plan", tiny_folder, "--run", tmp_path / "run", *options, "--min-fdt", 6, "--json")
    first = command(*arguments)
    measured, plan = finished(tmp_path / "run"), (tmp_path / "run" / "plan.json").read_bytes()
    again = command(*arguments)
    assert finished(tmp_path / "run") == measured  # with the time at which each was finished
    assert (tmp_path / "run" / "plan.json").read_bytes() == plan
    assert again.out == first.out
    assert f"resuming, {len(measured)} measurements are known" in again.err


def test_a_plan_takes_what_a_sweep_measured(tiny_folder, tmp_path, command, options):
    command("sweep", tiny_folder, "--run", tmp_path / "run", *options)
    measured = finished(tmp_path / "run")
    command("plan", tiny_folder, "--run", tmp_path / "run", *options, "--components", 2)
    assert finished(tmp_path / "run")[:21] == measured
    assert len(finished(tmp_path / "run")) == 22


def test_an_empty_plan_ends_with_1(tiny_folder, tmp_path, command, options):
    stop = ("--share", 0.000001)
    ended = command("plan", tiny_folder, "--run", tmp_path / "run", *options, *stop)
    assert ended.code == 1
    assert ended.errors == ["error: no component can be converted within the stop: the plan is empty"]
    assert json.loads((tmp_path / "run" / "plan.json").read_text())["configuration"] == {}


def test_a_report_of_a_sweep(tiny_folder, tmp_path, command, options):
    command("sweep", tiny_folder, "--run", tmp_path / "run", *options)
    ended = command("report", tmp_path / "run", "--json")
    assert ended.code == 0, ended.err
    written = json.loads(ended.out)["written"]
    assert str(tmp_path / "run" / "report.html") in written
    assert all((tmp_path / "run" / name).stat().st_size for name in written)


def test_a_text_with_fewer_prefixes_is_a_warning_in_one_line(tiny_folder, tmp_path, command, options):
    ended = command("evaluate", tiny_folder, tiny_folder, *options, "--probes", 999)
    assert ended.code == 0
    assert "warning: the text has 250 prefixes of 8 tokens, not 999" in ended.err.splitlines()


def test_components_without_finite_logits_harm_most_and_are_named(
    tiny_folder, tmp_path, command, options, monkeypatch
):
    plain, calls = dtm.Int8.compress, []

    def partly_ruined(self, weight, inputs=None):
        calls.append(weight)
        return plain(self, weight) * (torch.nan if weight.shape == (32, 64) else 1)

    monkeypatch.setattr(dtm.Int8, "compress", partly_ruined)
    arguments = ("sweep", tiny_folder, "--run", tmp_path / "run", *options)
    ended = command(*arguments, "--json")
    found = json.loads(ended.out, parse_constant=pytest.fail)["ranked"]
    assert ended.code == 0
    downs = [f"model.layers.{layer}.mlp.down_proj" for layer in range(3)]
    assert [each["component"] for each in found[-3:]] == downs
    assert found[-1]["fdt"]["mean"] == 0
    assert found[-1]["dppl"] == dict.fromkeys(found[-1]["dppl"]) | {
        "mean_interval": [None] * 2,
        "p75_interval": [None] * 2,
    }
    said = (
        f"logits that are not finite: {downs[0]} under int8 (and 2 more); counted as diverging at every token"
    )
    assert said in ended.err.splitlines()
    count = len(calls)
    again = command(*arguments)
    assert (again.code, len(calls)) == (0, count)
    assert said in again.err.splitlines()
    report = command("report", tmp_path / "run")
    assert report.code == 0, report.err
    page = (tmp_path / "run" / "report.html").read_text()
    assert "its logits are not finite: counted as diverging at every token" in page
    assert "Under 3 of them the logits are not finite, which counts as diverging at every token." in page


def test_the_model_that_breaks_is_the_one_that_is_named(tiny_folder, tmp_path, command, options, llama):
    with torch.no_grad():
        llama.model.norm.weight.fill_(3e38)  # finite, as its logits are not
    broken = tiny.save(tmp_path / "broken", llama)
    ended = command("evaluate", tiny_folder, broken, *options)
    assert ended.code == 1
    assert ended.errors == ["error: the compressed model: the model's logits are not finite"]


def test_ctrl_c_ends_with_130_and_says_how_to_go_on(tiny_folder, tmp_path, command, options, monkeypatch):
    plain, calls = dtm.Int8.compress, []

    def interrupted(self, weight, inputs=None):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return plain(self, weight)

    monkeypatch.setattr(dtm.Int8, "compress", interrupted)
    ended = command("sweep", tiny_folder, "--run", tmp_path / "run", *options)
    assert ended.code == 130
    expected = f"interrupted: 5 measurements are kept in {tmp_path / 'run'}; the same command resumes"
    assert expected in ended.err.splitlines()
    assert len(finished(tmp_path / "run")) == 5


def test_ctrl_c_while_completions_are_written_ends_with_130_and_a_line(
    tiny_folder, tmp_path, command, options, monkeypatch
):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(dtm.Probes, "from_text", interrupted)
    for arguments in (
        ("sweep", tiny_folder, "--run", tmp_path / "run"),
        ("evaluate", tiny_folder, tiny_folder),
    ):
        ended = command(*arguments, *options)
        assert ended.code == 130
        assert ended.err.splitlines()[-1] == "interrupted: what was not finished is not kept"
    assert not (tmp_path / "run").exists()


def test_bfloat16_is_asked_for_and_used(tiny_folder, tmp_path, command, options):
    command("sweep", tiny_folder, "--run", tmp_path / "run", *options, "--dtype", "bfloat16")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["model"]["dtype"] == "bfloat16"
