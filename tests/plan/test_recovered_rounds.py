"""Pruning rounds with training between them."""

import json
from dataclasses import replace
from functools import partial

import pytest
import tiny
import torch

import dtm_fast as dtm
from dtm_fast.compression import Change, Recovery
from dtm_fast.errors import InputError
from dtm_fast.model import Decoder, load_model, model_identity
from dtm_fast.plan import Plan, RecordedEvaluator, prune_and_recover, recovered_rounds
from dtm_fast.runs import Journal

pytestmark = pytest.mark.once

STEPS = (0.2, 0.1)
SETTINGS = Recovery(masked_steps=3, unmasked_steps=1, batch=4, length=16, micro_batch=4, checkpoint_every=2)
TOKENS = torch.randint(3, tiny.VOCABULARY, (12, 16), generator=torch.Generator().manual_seed(1))


def run(folder, probes, kind=dtm.Evaluator, settings=SETTINGS, steps=STEPS) -> Plan:
    """From the original model on, as the same command does."""
    folder.mkdir(exist_ok=True)
    model = tiny.model_of("llama")
    journal = Journal.open(folder / "journal.sqlite", {"model": model_identity(model)})
    try:
        return prune_and_recover(
            RecordedEvaluator(kind(model, probes), journal), TOKENS, folder, settings, steps
        )
    finally:
        journal.close()


@pytest.fixture
def probes(make_probes):
    return make_probes(tiny.model_of("llama"), 6)


def test_the_plan_is_that_of_the_trained_model_pruned_again(tmp_path, probes):
    plan = run(tmp_path / "run", probes)
    assert [each["step"] for each in plan.how["rounds"]] == list(STEPS)
    model = dtm.ReferenceEvaluator(tiny.model_of("llama"), probes).model
    folder = tmp_path / "run" / "round-2" / "recovery" / "model"
    trained = type(model).from_pretrained(folder).eval()
    assert plan.model == model_identity(trained) != model_identity(model)
    (found,) = dtm.ReferenceEvaluator(trained, probes, base=model).measure([plan.configuration], ("dppl",))
    assert plan.chosen.fdt == float(found.fdt.double().mean())
    assert plan.chosen.sdt == float(found.sdt.double().mean())
    weights = sum(c.numel for c in Decoder.of(trained).components.values())
    with Change(Decoder.of(trained), plan.configuration):
        zeros = sum(int((c.weight == 0).sum()) for c in Decoder.of(trained).components.values())
    assert abs(zeros - 0.3 * weights) <= 1, "half a weight each round"


def test_rounding_does_not_add_up(tmp_path, probes, monkeypatch):
    monkeypatch.setattr(recovered_rounds, "recover", lambda *_: None)
    steps = (0.3335, 0.3335, 0.333)
    plan = run(tmp_path / "run", probes, steps=steps)
    assert all(treatment.sparsity == 1 for treatment in plan.configuration.values())


def test_every_round_is_measured_as_the_first(tmp_path, probes, monkeypatch):
    given, plain = [], dtm.Evaluator.__init__

    def noted(self, model, probes, **options):
        given.append((options["layers"], options["memory"]))
        plain(self, model, probes, **options)

    monkeypatch.setattr(dtm.Evaluator, "__init__", noted)
    run(tmp_path / "run", probes, partial(dtm.Evaluator, layers="transformers", memory=2**20))
    assert given == [("transformers", 2**20)] * 3


def test_the_reference_finds_the_same(tmp_path, probes):
    ours, expected = run(tmp_path / "ours", probes), run(tmp_path / "its", probes, dtm.ReferenceEvaluator)
    assert ours.configuration == expected.configuration
    assert [point.fdt for point in ours.curve] == [point.fdt for point in expected.curve]
    assert ours.how["rounds"] == expected.how["rounds"]


@pytest.mark.parametrize("stop", [1, 2])
def test_what_was_broken_off_goes_on_and_ends_alike(tmp_path, probes, monkeypatch, stop):
    """Within the training of a round, or before it begins."""
    expected = run(tmp_path / "whole", probes)
    plain, calls = recovered_rounds.recover, []

    def broken(*arguments):
        calls.append(1)
        if len(calls) == stop:
            raise KeyboardInterrupt
        return plain(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(recovered_rounds, "recover", broken)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "run", probes)
    assert run(tmp_path / "run", probes) == expected
    losses = [
        [
            json.loads((tmp_path / name / f"round-{n}" / "recovery" / "losses.json").read_text())
            for n in (1, 2)
        ]
        for name in ("whole", "run")
    ]
    assert losses[0] == losses[1]


def test_other_arguments_are_refused(tmp_path, probes):
    run(tmp_path / "run", probes)
    other = replace(SETTINGS, masked_steps=4)
    with pytest.raises(InputError, match="masked_steps"):
        run(tmp_path / "run", probes, settings=other)


def test_the_command(tmp_path, tiny_folder, text_file, command):
    arguments = ["--text", text_file, "--prefix", 8, "--completion", 12, "--probes", 4, "--steps", "20,10"]
    arguments += [
        "--recover",
        text_file,
        "--masked-steps",
        2,
        "--unmasked-steps",
        1,
        "--batch",
        2,
        "--length",
        16,
    ]
    ended = command("prune", tiny_folder, "--run", tmp_path / "run", *arguments)
    assert ended.code == 0, ended.err
    plan = Plan.read(tmp_path / "run" / "plan.json")
    model, _ = load_model(tmp_path / "run" / "round-2" / "recovery" / "model")
    plan.check(Decoder.of(model))
    assert command("prune", tiny_folder, "--run", tmp_path / "run", *arguments).code == 0
    assert Plan.read(tmp_path / "run" / "plan.json") == plan
