import math
import types

import pytest
import tiny
import torch
from measurements import Ruin, assert_same, needs_kernels, some
from rounding import assert_within_rounding, rounding_of
from transformers.modeling_outputs import BaseModelOutputWithPast

import dtm_fast as dtm
from dtm_fast.compression import name_of
from dtm_fast.errors import ComponentError, MeasurementError, ModelError, ProbeError
from dtm_fast.measure import EXTRA_METRICS
from dtm_fast.measure.fused_layers import checked_parts
from dtm_fast.measure.prefix_tree import tree_of
from dtm_fast.measure.racing import fdt75
from dtm_fast.model import Decoder, model_identity
from dtm_fast.ops import native
from dtm_fast.ops.layer_weights import Arithmetic, has_arithmetic

UP = "model.layers.1.mlp.up_proj"
FUSED = ("llama", "mistral", "qwen2", "qwen3", "phi3")
ENGINES = ("fused", "transformers")


@pytest.fixture(params=ENGINES)
def layers(request: pytest.FixtureRequest) -> str:
    if request.param == "fused" and not has_arithmetic(Arithmetic.FLOAT32):
        pytest.skip("the instruction set in use has no kernel for fused layers")
    return request.param


@pytest.fixture
def evaluator(llama, make_probes, layers) -> dtm.Evaluator:
    return dtm.Evaluator(llama, make_probes(llama, 6), layers=layers)


@pytest.mark.parametrize("metrics", [(), ("sdt",)])
def test_it_gives_what_the_reference_gives(family, make_probes, draw_configuration, metrics):
    model = tiny.model_of(family)
    probes = make_probes(model, 6)
    configurations = [{}, *some(dtm.components(model), draw_configuration, 25)]
    found = dtm.Evaluator(model, probes).measure(configurations, metrics)
    expected = dtm.ReferenceEvaluator(model, probes).measure(configurations)
    met = set()
    for ours, other, configuration in zip(found, expected, configurations, strict=True):
        assert ours.configuration == configuration
        assert ours.fdt.tolist() == other.fdt.tolist()
        assert (ours.sdt is None) == (not metrics)
        assert ours.sdt is None or ours.sdt.tolist() == other.sdt.tolist()
        # Computed by differences that are multiplied in bfloat16: some percent of what changed.
        assert torch.allclose(ours.first_margin, other.first_margin, rtol=0.05, atol=0.05, equal_nan=True)
        met |= set(other.fdt.tolist())
    assert len(met) > 2  # otherwise equality would say little


@pytest.mark.once
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_own_layers_give_the_bits_of_the_reference(
    family, make_probes, draw_configuration, dtype
):
    model = tiny.model_of(family).to(dtype)
    probes = make_probes(model, 5, batch_size=3)
    evaluator = dtm.Evaluator(model, probes, layers="transformers")
    configurations = [{}, *some(dtm.components(model), draw_configuration, 6)]
    metrics = list(EXTRA_METRICS)
    expected = dtm.ReferenceEvaluator(model, probes).measure(configurations, metrics)
    for ours, other in zip(evaluator.measure(configurations, metrics), expected, strict=True):
        assert_same(ours, other)


@needs_kernels
@pytest.mark.parametrize("name", FUSED)
def test_all_metrics_are_those_of_the_reference(name, make_probes, draw_configuration):
    model = tiny.model_of(name)
    probes = make_probes(model, 5)
    evaluator = dtm.Evaluator(model, probes, layers="fused")
    configurations = [{}, *some(dtm.components(model), draw_configuration, 6)]
    metrics = list(EXTRA_METRICS)
    expected = dtm.ReferenceEvaluator(model, probes).measure(configurations, metrics)
    for ours, other in zip(evaluator.measure(configurations, metrics), expected, strict=True):
        assert (ours.fdt.tolist(), ours.sdt.tolist()) == (other.fdt.tolist(), other.sdt.tolist())
        for metric in metrics:
            # Two orders of summation in float32.
            assert torch.allclose(getattr(ours, metric), getattr(other, metric), rtol=1e-4, atol=1e-6), metric


@needs_kernels
@pytest.mark.parametrize("name", FUSED)
def test_in_bfloat16_what_differs_from_the_reference_is_rounding(name, make_probes, draw_configuration):
    if not has_arithmetic(Arithmetic.BFLOAT16):
        pytest.skip("the instruction set in use has no kernel for layers in bfloat16")
    model = tiny.model_of(name).to(torch.bfloat16)
    probes = make_probes(model, 6)
    evaluator = dtm.Evaluator(model, probes, layers="fused")
    configurations = [{}, *some(dtm.components(model), draw_configuration, 25)]
    expected = dtm.ReferenceEvaluator(model, probes).measure(configurations)
    assert_within_rounding(evaluator.measure(configurations, ()), expected, rounding_of(model, probes))


def test_the_base_never_diverges(evaluator):
    for metrics in ((), ("sdt",), ("dppl",)):
        (base,) = evaluator.measure([{}], metrics)
        assert base.fdt.tolist() == [12] * 6
        assert bool(base.first_margin.isnan().all())


def test_a_measurement_has_the_same_bits_whatever_else_is_measured(evaluator, draw_configuration):
    configurations = some(list(evaluator.decoder.components), draw_configuration, 12)
    for metrics in ((), ("dppl",)):
        together = evaluator.measure(configurations, metrics)
        backwards = evaluator.measure(configurations[::-1], metrics)[::-1]
        for one, other, configuration in zip(together, backwards, configurations, strict=True):
            assert_same(one, other)
            assert_same(one, evaluator.measure([configuration], metrics)[0])


def test_the_bits_do_not_depend_on_the_threads(evaluator, draw_configuration):
    configurations = some(list(evaluator.decoder.components), draw_configuration, 6)
    threads = torch.get_num_threads()
    found = []
    for number in (1, 2):
        torch.set_num_threads(number)
        try:
            fresh = dtm.Evaluator(evaluator.model, evaluator.probes, layers=evaluator_layers(evaluator))
            found.append(fresh.measure(configurations, ()) + fresh.measure(configurations, ("dppl",)))
        finally:
            torch.set_num_threads(threads)
    if evaluator_layers(evaluator) == "transformers":
        for one, other in zip(*found, strict=True):
            assert one.fdt.tolist() == other.fdt.tolist()  # the bits are torch's affair
        return
    for one, other in zip(*found, strict=True):
        assert_same(one, other)


def evaluator_layers(evaluator: dtm.Evaluator) -> str:
    return "fused" if evaluator.engine.startswith("fused") else "transformers"


@pytest.mark.parametrize("metrics", [(), ("sdt",)])
def test_as_many_layers_run_as_the_tree_has_edges(evaluator, draw_configuration, metrics):
    paths = list(evaluator.decoder.components)
    configurations = [
        {},
        *some(paths, draw_configuration, 8, most=3),
        *({path: dtm.Int8()} for path in paths),
    ]
    edges = len(list(tree_of(evaluator.decoder, configurations).computed()))
    evaluator.measure(configurations, metrics)
    assert evaluator.layer_evaluations == edges
    assert edges < (len(configurations) - 1) * tiny.LAYERS


def test_a_configuration_asked_for_twice_is_measured_once(evaluator):
    once, again, base = evaluator.measure([{UP: dtm.Prune(0.6)}, {UP: dtm.Prune(0.6)}, {}])
    assert_same(once, again)
    assert evaluator.layer_evaluations == 2
    assert base.sdt.tolist() == [0] * 6


@needs_kernels
@pytest.mark.parametrize("memory", [0, 20_000, 100_000, 10**9])
def test_less_memory_changes_no_answer(llama, make_probes, draw_configuration, memory):
    probes = make_probes(llama, 6)
    configurations = some(dtm.components(llama), draw_configuration, 10)
    found = dtm.Evaluator(llama, probes, layers="fused", memory=memory).measure(configurations, ())
    expected = dtm.ReferenceEvaluator(llama, probes).measure(configurations)
    assert [m.fdt.tolist() for m in found] == [m.fdt.tolist() for m in expected]


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_states_of_the_base_take_no_more_than_they_may(llama, make_probes, dtype):
    if dtype == torch.bfloat16 and not has_arithmetic(Arithmetic.BFLOAT16):
        pytest.skip("the instruction set in use has no kernel for layers in bfloat16")
    model = llama.to(dtype)
    probes = make_probes(model, 6)
    whole = dtm.Evaluator(model, probes, layers="fused", memory=10**9)
    kept = set()
    for memory in range(0, in_memory(whole) + 2_000, 1_000):
        evaluator = dtm.Evaluator(model, probes, layers="fused", memory=memory)
        assert in_memory(evaluator) <= memory
        kept.add(len(evaluator._layers._inner))
    assert kept == set(range(tiny.LAYERS + 1))


def in_memory(evaluator: dtm.Evaluator) -> int:
    """Bytes that the base's states take, between the layers and within them."""
    inner = [vars(states).values() for states in evaluator._layers._inner.values()]
    within = sum(each.nbytes for states in inner for each in states if each is not None)
    return evaluator._model_layers._store.in_memory + within


def test_a_treatment_of_the_input_is_left_to_transformers(evaluator):
    path = "model.layers.0.mlp.down_proj"
    configurations = [{path: dtm.W8A8()}, {path: dtm.W8A8(), UP: dtm.Prune(0.5)}, {UP: dtm.Int8()}]
    expected = dtm.ReferenceEvaluator(evaluator.model, evaluator.probes).measure(configurations)
    for metrics in ((), ("sdt",)):
        found = evaluator.measure(configurations, metrics)
        assert [m.fdt.tolist() for m in found] == [m.fdt.tolist() for m in expected]


@pytest.mark.parametrize("metrics", [(), ("sdt",), ("kl",)])
def test_a_nan_fails_its_configuration_and_no_other(evaluator, metrics):
    before = model_identity(evaluator.model)
    good = [{UP: dtm.Int8()}, {UP: dtm.Prune(0.5)}, {}]
    bad = {UP: Ruin(), "model.layers.2.mlp.up_proj": dtm.Int8()}
    finished = []
    with pytest.raises(MeasurementError, match=rf"^{UP} under ruin and 1 more: .* not finite$"):
        finished.extend(evaluator.iterate([good[0], bad, *good[1:]], metrics))
    assert {name_of(m.configuration) for m in finished} == {name_of(c) for c in good}
    again = evaluator.measure(good, metrics)
    for measurement in finished:
        same = next(m for m in again if m.configuration == measurement.configuration)
        assert_same(measurement, same)
    assert model_identity(evaluator.model) == before


def test_layers_that_return_tuples_are_stepped(llama, make_probes, draw_configuration):
    def body(self, input_ids, **_):
        hidden = self.embed_tokens(input_ids)
        positions = self.rotary_emb(hidden, torch.arange(input_ids.shape[1])[None])
        for layer in self.layers:
            hidden, nothing = layer(hidden, attention_mask=None, position_embeddings=positions)
            assert nothing is None
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden))

    probes = make_probes(llama, 4)
    for layer in llama.model.layers:
        layer.forward = lambda *args, plain=layer.forward, **kwargs: (plain(*args, **kwargs), None)
    llama.model.forward = types.MethodType(body, llama.model)
    configurations = [{}, *some(dtm.components(llama), draw_configuration, 6)]
    expected = dtm.ReferenceEvaluator(llama, probes).measure(configurations)
    for layers in ("transformers", "auto"):
        found = dtm.Evaluator(llama, probes, layers=layers).measure(configurations)
        assert [m.sdt.tolist() for m in found] == [m.sdt.tolist() for m in expected]


@pytest.mark.parametrize(("configuration", "error"), [({"lm_head": dtm.Int8()}, ComponentError)])
def test_a_configuration_that_does_not_fit_is_refused_before_anything_runs(evaluator, configuration, error):
    with pytest.raises(error):
        evaluator.measure([{UP: dtm.Int8()}, configuration])
    assert evaluator.layer_evaluations == 0


def test_an_unknown_metric_is_refused(evaluator):
    with pytest.raises(ValueError, match="no metric bleu; known: sdt, dppl, perplexity, agreement, kl"):
        evaluator.measure([{}], ["bleu"])


def test_a_prefix_of_one_token_has_no_perplexity(llama, make_probes, layers):
    evaluator = dtm.Evaluator(llama, make_probes(llama, prefix=1), layers=layers)
    with pytest.raises(ProbeError, match="no second token at n = 1"):
        evaluator.measure([{}], ["perplexity"])
    (found,) = evaluator.measure([{UP: dtm.Prune(0.5)}])
    (expected,) = dtm.ReferenceEvaluator(llama, evaluator.probes).measure([{UP: dtm.Prune(0.5)}])
    assert found.fdt.tolist() == expected.fdt.tolist()


def test_it_says_why_layers_are_not_fused(make_probes):
    model = tiny.model_of("gpt2")
    probes = make_probes(model, 2)
    reason = "GPT2Block is no layer that the fused kernel knows"
    if not has_arithmetic(Arithmetic.FLOAT32):
        reason = f"{native.cpu_isa()} has no kernel for layers in float32"
    assert reason in dtm.Evaluator(model, probes).engine
    with pytest.raises(ModelError, match=reason):
        dtm.Evaluator(model, probes, layers="fused")


@pytest.mark.parametrize("layers", ["tourch", "Transformers", None])
def test_layers_of_another_name_are_refused(llama, make_probes, layers):
    names = "auto, fused, torch, differences, transformers"
    with pytest.raises(ValueError, match=f"^layers must be one of {names}, not {layers!r}$"):
        dtm.Evaluator(llama, make_probes(llama, 1), layers=layers)


def test_a_model_in_float16_is_measured_by_its_own_layers(llama, make_probes, draw_configuration):
    model = llama.half()
    probes = make_probes(model, 4)
    evaluator = dtm.Evaluator(model, probes)
    assert (
        "the model is in torch.float16, and the fused kernels are for float32 and bfloat16"
        in evaluator.engine
    )
    configurations = [{}, *some(dtm.components(model), draw_configuration, 6)]
    expected = dtm.ReferenceEvaluator(model, probes).measure(configurations, ())
    for ours, other in zip(evaluator.measure(configurations), expected, strict=True):
        assert_same(ours, other)


class Doubled(torch.nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_logits_that_are_more_than_a_product_are_those_of_the_model(llama, make_probes, draw_configuration):
    llama.lm_head.__class__ = Doubled
    probes = make_probes(llama, 4)
    if has_arithmetic(Arithmetic.FLOAT32):
        with pytest.raises(ModelError, match="logits are more than a product"):
            dtm.Evaluator(llama, probes, layers="fused")
    configurations = [{}, *some(dtm.components(llama), draw_configuration, 6)]
    expected = dtm.ReferenceEvaluator(llama, probes).measure(configurations, ())
    for ours, other in zip(dtm.Evaluator(llama, probes).measure(configurations), expected, strict=True):
        assert_same(ours, other)


@needs_kernels
def test_a_layer_that_computes_something_else_is_not_fused(llama, make_probes):
    layer = llama.model.layers[1]
    plain = layer.mlp.forward
    layer.mlp.forward = lambda x: 1.01 * plain(x)
    with pytest.raises(ModelError, match="layer 1 is not what the fused kernel computes"):
        checked_parts(Decoder.of(llama), make_probes(llama, 1).tokens[:1])


@needs_kernels
@pytest.mark.parametrize("k", [1, 4, 100])
def test_the_best_are_those_of_the_exhaustive_sweep(llama, make_probes, k):
    evaluator = dtm.Evaluator(llama, make_probes(llama, 9), layers="fused")
    candidates = [
        {path: treatment}
        for path in evaluator.decoder.components
        for treatment in (dtm.Int8(), dtm.Prune(0.5))
    ]
    measured = evaluator.measure(candidates, ())
    ranked = sorted(measured, key=lambda m: (-fdt75(m.fdt), name_of(m.configuration)))
    race = evaluator.best(candidates, k)
    assert [m.configuration for m in race.best] == [m.configuration for m in ranked[:k]]
    assert [m.fdt.tolist() for m in race.best] == [m.fdt.tolist() for m in ranked[:k]]
    assert len(race.best) + len(race.dropped) == len(candidates)
    by_name = {name_of(m.configuration): m for m in measured}
    for dropped in race.dropped:
        assert dropped.proved
        assert dropped.highest >= fdt75(by_name[name_of(dropped.configuration)].fdt)


@needs_kernels
def test_a_race_reads_less_than_a_sweep(llama, make_probes):
    evaluator = dtm.Evaluator(llama, make_probes(llama, 9), layers="fused")
    race = evaluator.best([{path: dtm.Prune(0.5)} for path in evaluator.decoder.components], 3)
    unread = [dropped for dropped in race.dropped if int(dropped.seen.sum()) == 0]
    partly = [dropped for dropped in race.dropped if int((dropped.seen == 0).sum()) > 0]
    assert len(unread) + len(partly) > 0


@needs_kernels
def test_of_equals_only_the_lowest_names_are_read(llama, make_probes):
    evaluator = dtm.Evaluator(llama, make_probes(llama, 9), layers="fused")
    harmless = [{path: dtm.Prune(1e-6)} for path in sorted(evaluator.decoder.components)]
    race = evaluator.best(harmless[::-1], 3)
    assert [m.configuration for m in race.best] == harmless[:3]
    assert all(int(dropped.seen.sum()) == 0 for dropped in race.dropped)


@needs_kernels
@pytest.mark.parametrize(
    ("k", "error", "line"),
    [
        (0, 0.0, "k must be a whole number of at least 1, not 0"),
        (2.5, 0.0, r"k must be a whole number of at least 1, not 2\.5"),
        (True, 0.0, "k must be a whole number of at least 1, not True"),
        ("3", 0.0, "k must be a whole number of at least 1, not '3'"),
        (1, -0.1, r"error must be in \[0, 1\), not -0\.1"),
        (1, 1.0, r"error must be in \[0, 1\), not 1\.0"),
    ],
)
def test_a_race_that_cannot_be_meant_is_refused(llama, make_probes, k, error, line):
    evaluator = dtm.Evaluator(llama, make_probes(llama, 2), layers="fused")
    with pytest.raises(ValueError, match=f"^{line}$"):
        evaluator.best([{}], k, error=error)


def test_a_race_needs_the_fused_layers(make_probes):
    model = tiny.model_of("gpt2")
    with pytest.raises(ValueError, match="a race needs layers of our own; here run transformers' own"):
        dtm.Evaluator(model, make_probes(model, 2)).best([{}], 1)


@pytest.mark.once
@pytest.mark.parametrize("memory", [-1, "x", 1.5, True])
def test_memory_is_a_number_of_bytes(llama, make_probes, memory):
    with pytest.raises(
        ValueError, match=rf"memory must be a whole number of at least 0 bytes, not {memory!r}"
    ):
        dtm.Evaluator(llama, make_probes(llama, 2), memory=memory)


@needs_kernels
def test_where_nothing_is_a_difference_the_first_margin_is_the_references(make_probes, draw_configuration):
    model = tiny.model_of("llama").bfloat16()
    probes = make_probes(model, 6)
    configurations = some(dtm.components(model), draw_configuration, 12)
    evaluator = dtm.Evaluator(model, probes, layers="transformers")
    expected = dtm.ReferenceEvaluator(model, probes).measure(configurations)
    for ours, other in zip(evaluator.measure(configurations, ()), expected, strict=True):
        assert torch.equal(ours.first_margin.nan_to_num(-1), other.first_margin.nan_to_num(-1))
    exact = tiny.model_of("llama")
    probes = make_probes(exact, 6)
    dropped = [{path: dtm.Drop()} for path in dtm.components(exact)]  # too large a change for differences
    evaluator = dtm.Evaluator(exact, probes, layers="fused")
    expected = dtm.ReferenceEvaluator(exact, probes).measure(dropped)
    # Both in float32, in other orders of summation: sixteen steps of what the largest logit has.
    with torch.no_grad():
        largest = float(exact(probes.tokens).logits.abs().max())
    steps = 16 * math.ldexp(1, math.frexp(largest)[1] - 24)
    for ours, other in zip(evaluator.measure(dropped, ()), expected, strict=True):
        assert torch.allclose(ours.first_margin, other.first_margin, rtol=0, atol=steps, equal_nan=True)
