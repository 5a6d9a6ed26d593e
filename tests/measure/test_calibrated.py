"""Treatments that look at a component's inputs, and the others that are slow or treat inputs, in both evaluators."""

import random

import pytest
import tiny
import torch
from measurements import assert_same, needs_kernels

import dtm_fast as dtm
from dtm_fast.compression import Configuration
from dtm_fast.compression.kept_weights import KeptWeights
from dtm_fast.errors import ModelError, TreatmentError
from dtm_fast.measure import EXTRA_METRICS

UP, DOWN = "model.layers.1.mlp.up_proj", "model.layers.2.mlp.down_proj"
TREATMENTS = (
    dtm.GPTQ(16),
    dtm.GPTQ(None, damp=0.1),
    dtm.Int4(16),
    dtm.Int4(None),
    dtm.SparseGPT(0.3),
    dtm.SparseGPT("2:4"),
    dtm.Prune(0.4, "wanda"),
    dtm.Prune("4:8", "wanda"),
    dtm.Prune(0.3, group="row"),
    dtm.Prune("2:4"),
    dtm.Int8(),
    dtm.Drop(),
)
OF_INPUTS = (dtm.LLMInt8(1.0), dtm.W8A8())


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dtm_fast.compression.kept_weights._KEPT", KeptWeights(2**20))


def calibration_of(model, **options) -> dtm.Calibration:
    tokens = torch.randint(3, tiny.VOCABULARY, (8, 24), generator=torch.Generator().manual_seed(3))
    return dtm.Calibration.collect(model, tokens, cache=False, **options)


def mixed(model, count: int, treatments=TREATMENTS, seed: int = 0) -> list[Configuration]:
    """Each treatment alone, then some components under several."""
    draw, paths = random.Random(seed), dtm.components(model)
    alone = [{draw.choice(paths): each} for each in treatments]
    several = [
        {path: draw.choice(treatments) for path in draw.sample(paths, draw.randint(2, 5))}
        for _ in range(count)
    ]
    return [{}, *alone, *several]


@pytest.mark.parametrize(
    "layers",
    [pytest.param("fused", marks=needs_kernels), pytest.param("transformers", marks=pytest.mark.once)],
)
@pytest.mark.parametrize("treatments", [TREATMENTS, TREATMENTS + OF_INPUTS], ids=["weights", "inputs too"])
@pytest.mark.parametrize("metrics", [(), ("sdt",)])
def test_both_evaluators_agree(llama, make_probes, layers, treatments, metrics):
    probes, calibration = make_probes(llama, 6), calibration_of(llama)
    configurations = mixed(llama, 25, treatments)
    found = dtm.Evaluator(llama, probes, layers=layers, calibration=calibration).measure(
        configurations, metrics
    )
    expected = dtm.ReferenceEvaluator(llama, probes, calibration=calibration).measure(configurations)
    for ours, other in zip(found, expected, strict=True):
        assert ours.fdt.tolist() == other.fdt.tolist(), ours.configuration
        assert ours.sdt is None or ours.sdt.tolist() == other.sdt.tolist()
    assert len({value for other in expected for value in other.fdt.tolist()}) > 5


@pytest.mark.once
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_own_layers_give_the_bits_of_the_reference(family, make_probes, dtype):
    model = tiny.model_of(family).to(dtype)
    probes, calibration = make_probes(model, 4), calibration_of(model)
    configurations = mixed(model, 3, TREATMENTS + OF_INPUTS)
    evaluator = dtm.Evaluator(model, probes, layers="transformers", calibration=calibration)
    metrics = list(EXTRA_METRICS)
    expected = dtm.ReferenceEvaluator(model, probes, calibration=calibration).measure(configurations, metrics)
    for ours, other in zip(evaluator.measure(configurations, metrics), expected, strict=True):
        assert_same(ours, other)


@needs_kernels
def test_a_rebased_evaluator_agrees_too(llama, make_probes):
    probes, calibration = make_probes(llama, 6), calibration_of(llama)
    evaluator = dtm.Evaluator(llama, probes, layers="fused", calibration=calibration)
    base = {UP: dtm.GPTQ(16), "model.layers.0.self_attn.q_proj": dtm.SparseGPT(0.2)}
    extended = [base | {DOWN: treatment} for treatment in TREATMENTS]
    found = evaluator.rebased(base).measure(extended, ())
    expected = dtm.ReferenceEvaluator(llama, probes, calibration=calibration).measure(extended)
    assert [m.fdt.tolist() for m in found] == [m.fdt.tolist() for m in expected]


@pytest.mark.parametrize("evaluator_of", [dtm.Evaluator, dtm.ReferenceEvaluator])
def test_a_slow_treatment_is_computed_once_for_a_component(llama, make_probes, evaluator_of, monkeypatch):
    asked = []
    compress = dtm.GPTQ.compress
    monkeypatch.setattr(
        dtm.GPTQ, "compress", lambda self, *given: asked.append(self.key) or compress(self, *given)
    )
    probes, calibration = make_probes(llama, 3), calibration_of(llama)
    gptq, others = {UP: dtm.GPTQ(16), DOWN: dtm.GPTQ(16)}, [DOWN, "model.layers.0.mlp.up_proj"]
    for _ in range(2):
        evaluator = evaluator_of(llama, probes, calibration=calibration)
        several = [{UP: dtm.GPTQ(16), path: dtm.Int8()} for path in others]
        evaluator.measure([gptq, *several, {DOWN: dtm.GPTQ(16)}])
        evaluator.measure([{**gptq, "model.layers.0.mlp.up_proj": dtm.Drop()}])
    assert asked == ["gptq(16)", "gptq(16)"]


def test_a_configuration_has_the_same_bits_whether_kept_or_computed_anew(llama, make_probes, monkeypatch):
    probes, configurations = make_probes(llama, 4), mixed(llama, 6)
    measured = []
    for _ in range(2):
        monkeypatch.setattr("dtm_fast.compression.kept_weights._KEPT", KeptWeights(1))
        evaluator = dtm.Evaluator(llama, probes, calibration=calibration_of(llama))
        measured.append(evaluator.measure(configurations, ("dppl",)))
        configurations = configurations[::-1]
    for one, other in zip(measured[0], measured[1][::-1], strict=True):
        assert_same(one, other)


def test_llm_int8_of_a_probe_does_not_depend_on_the_batch(llama, make_probes):
    configuration = dict.fromkeys(dtm.components(llama), dtm.LLMInt8(1.0))
    by_rows = []
    for batch_size in (1, 5):
        probes = make_probes(llama, 5, batch_size=batch_size)
        (found,) = dtm.ReferenceEvaluator(llama, probes).measure([configuration])
        by_rows.append((found.fdt.tolist(), found.sdt.tolist()))
    assert by_rows[0] == by_rows[1]
    assert max(by_rows[0][1]) > 0


@pytest.mark.parametrize("evaluator_of", [dtm.Evaluator, dtm.ReferenceEvaluator])
@pytest.mark.parametrize(
    ("calibrated", "treatment", "said"),
    [
        (True, dtm.Int4(), f"{UP}: int4(128) needs a K that is a multiple of 128, and K = 32"),
        (True, dtm.Prune("3:5"), f"{UP}: the pattern 3:5 needs rows of a multiple of 5, and K = 32"),
        (
            False,
            dtm.GPTQ(16),
            f"{UP}: gptq(16) looks at the model's activations: it needs "
            "calibration=Calibration.from_text(model, tokenizer, documents)",
        ),
    ],
)
def test_what_does_not_fit_is_said_before_anything_runs(
    llama, make_probes, evaluator_of, calibrated, treatment, said
):
    calibration = calibration_of(llama) if calibrated else None
    evaluator = evaluator_of(llama, make_probes(llama, 3), calibration=calibration)
    run = []
    handle = llama.model.layers[0].register_forward_hook(lambda *_: run.append(1))
    with pytest.raises(TreatmentError) as error:
        evaluator.measure([{UP: treatment}])
    handle.remove()
    assert str(error.value) == said
    assert not run


@pytest.mark.parametrize("evaluator_of", [dtm.Evaluator, dtm.ReferenceEvaluator])
def test_a_calibration_of_another_model_is_refused(llama, make_probes, evaluator_of):
    other = calibration_of(tiny.model_of("llama", seed=1))
    with pytest.raises(ModelError, match="the calibration is of another model"):
        evaluator_of(llama, make_probes(llama, 3), calibration=other)
