import math
import random

import plain_loop
import pytest
import tiny
import torch
from measurements import Ruin

import dtm_fast as dtm
from dtm_fast.compression import Configuration
from dtm_fast.errors import ComponentError, MeasurementError, ModelError, ProbeError, TreatmentError
from dtm_fast.measure import EXTRA_METRICS, ReferenceEvaluator
from dtm_fast.model import model_identity

pytestmark = pytest.mark.once

UP = "model.layers.1.mlp.up_proj"


def plain_changes(configuration: Configuration) -> dict:
    """The configuration in the words of ``plain_loop``."""
    return {
        path: plain_loop.int8
        if treatment == dtm.Int8()
        else lambda w, sparsity=treatment.sparsity: plain_loop.prune(w, sparsity)
        for path, treatment in configuration.items()
    }


def assert_as_the_plain_loop(model, probes, configurations) -> set:
    """Both give the same; returns the (FDT, SDT) pairs that were met."""
    measured = ReferenceEvaluator(model, probes).measure(configurations)
    met = set()
    for configuration, found in zip(configurations, measured, strict=True):
        changes = plain_changes(configuration)
        fdt, sdt = plain_loop.fdt_and_sdt(model, probes.tokens, probes.prefix, changes)
        assert (found.fdt.tolist(), found.sdt.tolist()) == (fdt, sdt), configuration
        met |= set(zip(fdt, sdt, strict=True))
    return met


def test_it_gives_what_a_plain_loop_gives(family, make_probes, draw_configuration):
    model, draw = tiny.model_of(family), random.Random(0)
    paths = dtm.components(model)
    configurations = [draw_configuration(paths, draw, 5) for _ in range(12)]
    met = assert_as_the_plain_loop(model, make_probes(model, 6), configurations)
    assert len(met) > 5  # otherwise equality would say little


@pytest.mark.long
@pytest.mark.model
def test_on_smollm2_it_gives_what_a_plain_loop_gives(smollm2, draw_configuration):
    model, tokenizer = smollm2
    probes = dtm.Probes.from_text(model, tokenizer, dtm.read_documents(), 12, 20, 4)
    paths, draw = dtm.components(model), random.Random(20)
    configurations = [draw_configuration(paths, draw, most) for most in (2, 5, 10, 20, 60) for _ in range(3)]
    before = model_identity(model)
    met = assert_as_the_plain_loop(model, probes, configurations)
    assert model_identity(model) == before
    assert len(met) > 20


def test_the_base_itself_never_diverges(family, make_probes):
    model = tiny.model_of(family)
    (found,) = ReferenceEvaluator(model, make_probes(model)).measure([{}])
    assert found.fdt.tolist() == [12] * 4
    assert found.sdt.tolist() == [0] * 4
    assert bool(found.first_margin.isnan().all())


def test_the_model_is_afterwards_as_it_was(family, make_probes):
    model = tiny.model_of(family)
    probes, before = make_probes(model), model_identity(model)
    everything = dict.fromkeys(dtm.components(model), dtm.W8A8())
    ReferenceEvaluator(model, probes).measure([everything, {}])
    assert model_identity(model) == before


def test_w8a8_on_every_component_against_modules_that_do_it(llama, make_probes):
    probes = make_probes(llama)
    (found,) = ReferenceEvaluator(llama, probes).measure([dict.fromkeys(dtm.components(llama), dtm.W8A8())])
    hooks = []
    for path in dtm.components(llama):
        module = llama.get_submodule(path)
        module.weight.data = plain_loop.int8(module.weight.data)
        hooks.append(
            module.register_forward_pre_hook(lambda _, x: plain_loop.int8(x[0].flatten(0, 1)).view_as(x[0]))
        )
    fdt, sdt = plain_loop.fdt_and_sdt(llama, probes.tokens, probes.prefix, {})
    assert (found.fdt.tolist(), found.sdt.tolist()) == (fdt, sdt)
    assert sum(sdt) > 0


def by_formula(base, model, probes) -> dict[str, list[float]]:
    """papers.md §1.1 and llama.cpp's definitions, a position at a time, in Python's own floats."""
    n, found = probes.prefix, {name: [] for name in EXTRA_METRICS}
    with torch.no_grad():
        p, q = (m(probes.tokens).logits.double().log_softmax(-1).tolist() for m in (base, model))
    for row, tokens in enumerate(probes.tokens.tolist()):
        surprise = [-q[row][i - 1][tokens[i]] for i in range(1, len(tokens))]
        found["perplexity"].append(math.exp(math.fsum(surprise[: n - 1]) / (n - 1)))
        found["dppl"].append(math.exp(math.fsum(surprise[n - 1 :]) / probes.completion))
        same = [p[row][i].index(max(p[row][i])) == q[row][i].index(max(q[row][i])) for i in range(n - 1)]
        found["agreement"].append(sum(same) / len(same))
        kl = [
            math.fsum(math.exp(a) * (a - b) for a, b in zip(p[row][i], q[row][i], strict=True))
            for i in range(n - 1, len(tokens) - 1)
        ]
        found["kl"].append(math.fsum(kl) / len(kl))
    return found


def test_all_metrics_are_those_of_the_formulas(family, make_probes):
    base, other = tiny.model_of(family), tiny.model_of(family)
    probes = make_probes(base)
    with torch.no_grad():
        for i, p in enumerate(other.parameters()):
            p += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
    (found,) = ReferenceEvaluator(other, probes, base=base).measure([{}], list(EXTRA_METRICS))
    for name, expected in by_formula(base, other, probes).items():
        value = getattr(found, name)
        assert value.dtype == torch.float64
        assert value.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-6), name


def test_of_the_base_itself_kl_is_zero_and_agreement_one(llama, make_probes):
    (found,) = ReferenceEvaluator(llama, make_probes(llama)).measure([{}], ["kl", "agreement"])
    assert found.kl.tolist() == [0.0] * 4
    assert found.agreement.tolist() == [1.0] * 4


def test_only_what_was_asked_for_is_measured(llama_evaluator):
    (found,) = llama_evaluator.measure([{}], ["kl"])
    assert [name for name in EXTRA_METRICS if getattr(found, name) is not None] == ["kl"]


def test_the_batch_size_changes_only_who_is_computed_with_whom(llama, make_probes):
    configuration = {UP: dtm.Prune(0.6)}
    one, three = (
        ReferenceEvaluator(llama, make_probes(llama, 5, batch_size=b)).measure([configuration])[0]
        for b in (1, 3)
    )
    assert torch.equal(one.fdt, three.fdt)
    assert torch.equal(one.sdt, three.sdt)
    torch.testing.assert_close(one.dppl, three.dppl)


@pytest.mark.parametrize("evaluator_of", [dtm.Evaluator, ReferenceEvaluator])
def test_what_is_no_list_is_refused(llama, make_probes, evaluator_of):
    evaluator = evaluator_of(llama, make_probes(llama, 2))
    with pytest.raises(ValueError, match="configurations: expected a list of configurations, not one"):
        evaluator.measure({UP: dtm.Int8()})
    with pytest.raises(ValueError, match="metrics: expected a list of names, not 'dppl'"):
        evaluator.measure([{}], "dppl")


@pytest.mark.parametrize("evaluator_of", [dtm.Evaluator, ReferenceEvaluator])
def test_a_model_in_train_mode_is_refused(llama, make_probes, evaluator_of):
    probes = make_probes(llama, 2)
    with pytest.raises(ModelError, match=r"the model is in train mode, .*: model.eval\(\)"):
        evaluator_of(llama.train(), probes)


def test_iterate_measures_one_at_a_time(llama_evaluator):
    handed = []

    def configurations():
        for sparsity in (0.1, 0.2):
            handed.append(sparsity)
            yield {UP: dtm.Prune(sparsity)}

    measured = llama_evaluator.iterate(configurations())
    next(measured)
    assert handed == [0.1]


def test_the_measurement_remembers_its_configuration(llama_evaluator):
    configuration = {UP: dtm.Int8()}
    (found,) = llama_evaluator.measure([configuration])
    assert (found.configuration, found.completion) == (configuration, 12)
    assert found.seconds > 0


def test_the_first_margin_is_how_far_the_base_lost(llama_evaluator):
    (found,) = llama_evaluator.measure([{UP: dtm.Prune(1.0)}])
    diverges = found.fdt < 12
    assert bool(diverges.any())
    assert bool((found.first_margin[diverges] > 0).all())


def test_logits_that_are_not_finite_name_the_configuration_and_leave_the_model(llama_evaluator):
    before = model_identity(llama_evaluator.model)
    with pytest.raises(MeasurementError, match=rf"{UP} under ruin and 1 more: .* not finite"):
        llama_evaluator.measure([{UP: Ruin(), "model.layers.0.mlp.up_proj": dtm.Int8()}])
    assert model_identity(llama_evaluator.model) == before


def test_activations_that_overflow_under_w8a8_name_the_configuration(llama_evaluator):
    llama_evaluator.model.model.layers[0].mlp.up_proj.weight.data.fill_(3e38)
    with pytest.raises(MeasurementError, match=r"down_proj under w8a8: .*cannot be quantized"):
        llama_evaluator.measure([{"model.layers.0.mlp.down_proj": dtm.W8A8()}])


@pytest.mark.parametrize(
    ("configuration", "error"), [({"lm_head": dtm.Int8()}, ComponentError), ({UP: "int8"}, TreatmentError)]
)
def test_a_configuration_that_does_not_fit_is_refused(llama_evaluator, configuration, error):
    with pytest.raises(error):
        llama_evaluator.measure([configuration])


def test_an_unknown_metric_is_refused(llama_evaluator):
    with pytest.raises(ValueError, match="no metric bleu; known: sdt, dppl, perplexity, agreement, kl"):
        llama_evaluator.measure([{}], ["bleu"])


@pytest.mark.parametrize("metric", ["perplexity", "agreement"])
def test_a_prefix_of_one_token_has_no_perplexity(llama, make_probes, metric):
    evaluator = ReferenceEvaluator(llama, make_probes(llama, prefix=1))
    with pytest.raises(ProbeError, match="no second token at n = 1"):
        evaluator.measure([{}], [metric])
