"""The commands of the searches, and a plan exported and brought back."""

import json
import re

import pytest

import dtm_fast as dtm
from dtm_fast.cli import setting
from dtm_fast.errors import InputError, TrainingError
from dtm_fast.plan import Plan, reached_by, recovered_rounds
from dtm_fast.runs import RunDirectory

SMALL = ("--prefix", 8, "--completion", 12, "--probes", 4)


@pytest.fixture
def search(command, tiny_folder, tmp_path, text_file):
    """Runs a search on the tiny model: how it ended, and its plan."""

    def run(name, *arguments):
        ended = command(name, tiny_folder, "--run", tmp_path / "run", "--text", text_file, *SMALL, *arguments)
        plan = tmp_path / "run" / "plan.json"
        return ended, Plan.read(plan) if plan.exists() else None

    return run


def test_pruning_rounds(search, tmp_path):
    ended, plan = search("prune", "--steps", "20,10")
    assert ended.code == 0, ended.err
    assert (plan.search, plan.how["steps"]) == ("pruning rounds", [0.2, 0.1])
    assert all(0 < each.sparsity <= 1 for each in plan.configuration.values())
    assert (tmp_path / "run" / "report.html").exists()
    assert "Plan: pruning rounds" in ended.out


def test_without_what_a_report_needs_the_plan_is_there_and_told(search, monkeypatch):
    def missing(directory):
        raise InputError("a report needs: pip install 'dtm-fast[report]'")

    monkeypatch.setattr("dtm_fast.cli.searches.write_report_of", missing)
    ended, plan = search("prune", "--steps", "10", "--json")
    assert (ended.code, json.loads(ended.out)["plan"]) == (0, plan.to_json())
    assert "no report: a report needs: pip install 'dtm-fast[report]'" in " ".join(ended.err.split())


def test_a_beam_of_fused_units(search):
    ended, plan = search(
        "beam", "--treatment", "int8", "--treatment", "prune(0.3)", "--depth", 2, "--width", 2, "--fused"
    )
    assert ended.code == 0, ended.err
    assert (plan.search, plan.how["width"], len(plan.curve)) == ("beam", 2, 2)
    assert set(plan.how["treatments"]) == {"int8", "prune(0.3)"}


def test_a_joint_search_and_the_same_again_measures_nothing(search, command, tmp_path):
    arguments = ("--treatment", "int8", "--treatment", "prune(0.5)", "--budget", 11, "--budget", 13, "--json")
    ended, plan = search("joint", *arguments)
    assert ended.code == 0, ended.err
    assert json.loads(ended.out)["plan"] == plan.to_json()
    assert all(point.bits <= budget for budget, point in reached_by(plan).items())
    again, same = search("joint", *arguments)
    assert (again.code, same) == (0, plan)
    with RunDirectory.read(tmp_path / "run" / "confirming") as confirming:
        assert plan.how["confirmed_on"] == 4
        assert 0 < len(confirming.journal) < 20
    assert command("report", tmp_path / "run").code == 0


def test_a_joint_search_without_other_probes(search, tmp_path, text_file):
    arguments = ("--treatment", "int8", "--budget", 11, "--refinements", 0)
    ended, plan = search("joint", *arguments, "--confirm", 0)
    assert (ended.code, plan.how["confirmed_on"]) == (0, None)
    assert not (tmp_path / "run" / "confirming").exists()
    text_file.write_text(text_file.read_text()[:32])
    ended, plan = search("joint", *arguments, "--run", tmp_path / "short", "--prefix", 8)
    assert ended.code == 0
    assert "not confirmed: the text has no other prefixes of 8 tokens than the" in ended.err


def test_what_other_criteria_choose(search, tmp_path):
    ended, _ = search("compare", "--budget", 13, "--by", "fdt", "--by", "layer error", "--by", "gradient")
    assert ended.code == 0, ended.err
    stored = json.loads((tmp_path / "run" / "comparison.json").read_text())
    assert [row["by"] for row in stored["rows"]] == ["fdt", "layer error", "gradient"]
    assert "Chosen by" in ended.out


def test_criteria_share_the_measurements_of_single_components(search, tmp_path):
    ended, _ = search("compare", "--budget", 13, "--prefix", 1)
    assert ended.code == 0, ended.err
    stored = json.loads((tmp_path / "run" / "comparison.json").read_text())
    # Prefixes of one token have no perplexity.
    assert [row["by"] for row in stored["rows"]] == ["fdt", "sdt", "dppl", "kl", "layer error", "gradient"]
    with RunDirectory.read(tmp_path / "run") as directory:
        assert 22 < len(directory.journal) <= 22 + 6


def test_a_plan_stays_the_same_when_more_is_measured_after_it(
    search, command, tiny_folder, tmp_path, text_file
):
    arguments = ("--treatment", "prune(0.5)", "--rank-by", "dppl", "--components", 2, "--every", 1)
    search("plan", *arguments)
    plan = (tmp_path / "run" / "plan.json").read_bytes()
    search("sweep", "--treatment", "prune(0.5)", "--rank-by", "kl")
    search("plan", *arguments)
    assert (tmp_path / "run" / "plan.json").read_bytes() == plan


def test_what_holds_sdt_is_not_measured_again_for_it(search, tmp_path):
    search("sweep", "--treatment", "int8", "--rank-by", "dppl")
    search("joint", "--treatment", "int8", "--budget", 11, "--refinements", 0)
    with RunDirectory.read(tmp_path / "run") as directory:
        assert len(directory.journal) <= 21 + 1 + 3  # alone, the base, the proposals


def test_a_training_that_fails_is_said_in_one_line(search, text_file, monkeypatch, capsys):
    def fail(*_):
        raise TrainingError("recovery, step 1 of 4 (masked): the loss is nan")

    monkeypatch.setattr(recovered_rounds, "recover", fail)
    arguments = ("--steps", 20, "--recover", text_file, "--batch", 2, "--length", 16)
    ended, plan = search("prune", *arguments, "--masked-steps", 3, "--unmasked-steps", 1)
    assert (ended.code, ended.errors, plan) == (
        1,
        ["error: recovery, step 1 of 4 (masked): the loss is nan"],
        None,
    )


def test_treatments_that_look_at_activations(search):
    ended, plan = search("plan", "--treatment", "prune(0.5,wanda)", "--components", 3)
    assert ended.code == 0, ended.err
    assert {each.key for each in plan.configuration.values()} == {"prune(0.5,wanda)"}
    assert "calibrating" in ended.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("prune", "--steps", "20,x"), "steps: numbers with commas between, such as 20,15,10; not '20,x'"),
        (("prune", "--steps", "80,30"), "steps: they may add up to 1, not to 1.1"),
        (("compare", "--budget", 8, "--by", "taste"), "no harm 'taste'; known: fdt, sdt"),
        (
            ("compare", "--budget", 8, "--by", "perplexity", "--prefix", 1),
            "needs prefixes of at least 2 tokens, not 1",
        ),
        (("prune", "--batch", 8), "options of a training (--masked-steps, --batch …) need --recover"),
        (("sweep", "--evaluator", "reference", "--memory", 1), "memory: the reference keeps no states"),
        (("joint", "--budget", 11, "--confirm", -1), "confirm: a whole number of at least 0, not -1"),
        (("joint", "--budget", 11, "--refinements", -1), "refinements: a whole number of at least 0, not -1"),
        (("sweep", "--memory", "inf"), "memory: 0 to 1048576 GiB, not inf"),
        (("sweep", "--memory", "nan"), "memory: 0 to 1048576 GiB, not nan"),
        (
            ("prune", "--recover", "{text}", "--masked-steps", 1, "--batch", 2, "--length", 500),
            "length 500 is beyond the model's context of 128 tokens",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_searched_is_refused_before_anything_is_measured(
    search, tmp_path, text_file, arguments, message
):
    ended, plan = search(*(str(text_file) if each == "{text}" else each for each in arguments))
    assert (ended.code, plan) == (2, None)
    (line,) = ended.errors
    assert message in line
    journal = tmp_path / "run" / "journal.sqlite"
    if journal.exists():
        with RunDirectory.read(tmp_path / "run") as directory:
            assert len(directory.journal) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("sweep", "--calibration", "nope.txt"),
            "nope.txt: cannot be read as text: No such file or directory",
        ),
        (("sweep", "--probes", 0), "probes must be a whole number of at least 1, not 0"),
        (("sweep", "--run", "/proc/run"), "/proc/run: cannot write a run there: No such file or directory"),
        (("beam", "--depth", 0), "depth: at least 1 unit to treat, not 0"),
        (("beam", "--depth", 2, "--width", 0), "width: at least 1 configuration to keep, not 0"),
        (("beam", "--depth", 2, "--among", 0), "among: at least 1 unit to look at, not 0"),
        (("joint", "--budget", 99), "budget: 0 to 16 effective bits, those of the model as it is, not 99"),
        (
            ("compare", "--budget", "1e305"),
            "budget: 0 to 16 effective bits, those of the model as it is, not 1e+305",
        ),
    ],
    ids=str,
)
def test_what_needs_no_model_to_be_refused_is_refused_before_it_is_loaded(
    search, tmp_path, monkeypatch, arguments, message
):
    monkeypatch.setattr(setting, "load_model", lambda *_: pytest.fail("the model was loaded"))
    ended, _ = search(*arguments)
    assert (ended.code, ended.errors) == (2, [f"error: {message}"])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("beam", "--depth", 99), "depth: 1 … 21 (units), not 99"),
        (("beam", "--depth", 13, "--fused"), "depth: 1 … 12 (units), not 13"),
        (
            ("sweep", "--treatment", "int4(7)"),
            "q_proj: int4(7) needs a K that is a multiple of 7, and K = 32",
        ),
        (("plan", "--treatment", "gptq(7)"), "q_proj: gptq(7) needs a K that is a multiple of 7, and K = 32"),
        (("joint", "--budget", 8, "--treatment", "int4(48)"), "int4(48) needs a K that is a multiple of 48"),
        (
            ("joint", "--budget", 0, "--treatment", "int8"),
            "budget: 0 effective bits cannot be reached; the smallest",
        ),
        (("joint", "--budget", 1, "--treatment", "gptq(16)"), "budget: 1 effective bits cannot be reached"),
        (("compare", "--budget", 1), "budget: 1 effective bits cannot be reached; the smallest"),
    ],
    ids=str,
)
def test_what_does_not_fit_the_model_is_refused_before_it_writes_its_completions(
    search, tmp_path, monkeypatch, arguments, message
):
    monkeypatch.setattr(dtm.Probes, "from_text", lambda *_, **__: pytest.fail("the base writes"))
    ended, _ = search(*arguments)
    (line,) = ended.errors
    assert ended.code == 2
    assert message in line
    assert not (tmp_path / "run").exists()


def test_a_model_that_cannot_be_trained_is_refused_before_it_writes_its_completions(
    search, tmp_path, monkeypatch, text_file
):
    monkeypatch.setattr(dtm.Probes, "from_text", lambda *_, **__: pytest.fail("the base writes"))
    ended, _ = search("prune", "--dtype", "bfloat16", "--recover", text_file, "--length", 16)
    (line,) = ended.errors
    assert ended.code == 2
    assert "recovery trains float32, model.embed_tokens.weight is torch.bfloat16" in line
    assert not (tmp_path / "run").exists()


def test_how_many_measurements_a_search_will_make(search, tmp_path):
    ended, _ = search("beam", "--depth", 2, "--width", 2)
    assert "ETA" not in ended.err  # a race drops what nobody can know beforehand
    ended, _ = search("beam", "--depth", 2, "--width", 2, "--by", "dppl")
    (last,) = re.findall(r"beam: (\d+)/(\d+), .*", ended.err)[-1:]
    assert 0.8 < int(last[0]) / int(last[1]) <= 1
    ended, _ = search(
        "joint", "--budget", 11, "--treatment", "int8", "--treatment", "prune(0.5)", "--confirm", 0
    )
    (last,) = re.findall(r"joint: (\d+)/(\d+), .*", ended.err)[-1:]
    assert 0.6 < int(last[0]) / int(last[1]) <= 1
    criteria = ("--by", "fdt", "--by", "sdt", "--by", "layer error")
    ended, _ = search("compare", "--run", tmp_path / "compared", "--budget", 11, *criteria)
    (last,) = re.findall(r"compare: (\d+)/(\d+), .*", ended.err)[-1:]
    assert 0.9 < int(last[0]) / int(last[1]) <= 1


def test_a_plan_is_exported_and_brought_back(search, command, tiny_folder, tmp_path):
    _, plan = search("plan", "--treatment", "w8a8", "--components", 4)
    folder, file = tmp_path / "exported", tmp_path / "run" / "plan.json"
    ended = command("export", tiny_folder, file, folder)
    assert ended.code == 0, ended.err
    assert f"wrote {folder}" in ended.out
    loaded = command("load", folder, "--json")
    assert loaded.code == 0, loaded.err
    assert json.loads(loaded.out)["layers"]["Int8Linear"] == len(plan.configuration) == 4


def test_a_plan_for_another_model_is_not_exported(search, command, tiny_folder, tmp_path):
    search("plan", "--treatment", "int8", "--components", 2)
    file = tmp_path / "run" / "plan.json"
    file.write_text(file.read_text().replace('"model": "', '"model": "0'))
    ended = command("export", tiny_folder, file, tmp_path / "exported")
    assert ended.code == 2
    assert "made for another model" in ended.errors[0]
    for content, said in (
        ('{"format": 2, ', "Expecting property name enclosed in double quotes: line 1 column 15 (char 14)"),
        ("{}", "not a plan of dtm_fast: plan: its format is missing"),
        ("[]", "not a plan of dtm_fast: plan: it holds no names and values"),
    ):
        file.write_text(content)
        ended = command("export", tiny_folder, file, tmp_path / "exported")
        assert (ended.code, ended.errors) == (2, [f"error: {file}: {said}"])
    assert not (tmp_path / "exported").exists()


def test_llama_quantize_is_told_nothing_where_the_export_cannot_be(search, command, tiny_folder, tmp_path):
    search("plan", "--treatment", "gptq(16)", "--components", 2)
    run, file = tmp_path / "run", tmp_path / "types.txt"
    ended = command("export", tiny_folder, run / "plan.json", tmp_path / "out", "--llama-quantize", file)
    assert (ended.code, len(ended.errors)) == (2, 1)
    assert "llama-quantize has nothing like gptq(16)" in ended.errors[0]
    search("plan", "--treatment", "int8", "--components", 2)
    ended = command("export", tiny_folder, run / "plan.json", run, "--llama-quantize", file)
    assert (ended.code, len(ended.errors)) == (2, 1)
    assert "there is something already" in ended.errors[0]
    for place in (tmp_path / "none" / "types.txt", tmp_path):
        ended = command("export", tiny_folder, run / "plan.json", tmp_path / "out", "--llama-quantize", place)
        assert (ended.code, len(ended.errors)) == (2, 1)
        assert f"{place}: cannot be written: " in ended.errors[0]
        assert not (tmp_path / "out").exists()
    arguments = ("--llama-quantize", file, "--for-vllm")
    search(
        "plan", "--treatment", "w8a8", "--components", 1
    )  # a part of what vLLM multiplies by as one matrix
    ended = command("export", tiny_folder, run / "plan.json", tmp_path / "out", *arguments)
    assert (ended.code, len(ended.errors)) == (2, 1)
    assert "vLLM" in ended.errors[0]
    assert not file.exists()


def test_the_plan_of_a_file_is_accelerated_and_restored(search, tiny_folder):
    _, plan = search("plan", "--treatment", "w8a8", "--components", 3)
    model, _ = dtm.load_model(tiny_folder)
    before = dict(model.named_modules())
    said = dtm.accelerate(model, plan)
    assert sum(each.layer == "Int8Linear" for each in said.components.values()) == 3
    dtm.restore(model)
    assert dict(model.named_modules()) == before
