"""Layers by torch's operations on differences to the base: here on the CPU, beside the reference."""

import pytest
import tiny
import torch
from measurements import Ruin, assert_same, some

import dtm_fast as dtm
from dtm_fast.compression import name_of
from dtm_fast.errors import MeasurementError, ModelError
from dtm_fast.measure import difference_error
from dtm_fast.measure.device_change import TreatedWeight, base_states, run_change
from dtm_fast.measure.racing import fdt75

pytestmark = pytest.mark.once

UP = "model.layers.1.mlp.up_proj"
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3")
IN_PARTS = (0.04, 0.1, 0.25, 0.5, 1.0)


def evaluator_of(model, probes, shares=IN_PARTS, **options) -> dtm.Evaluator:
    evaluator = dtm.Evaluator(model, probes, layers="differences", **options)
    evaluator._layers._shares = shares
    return evaluator


@pytest.fixture
def evaluator(llama, make_probes) -> dtm.Evaluator:
    return evaluator_of(llama, make_probes(llama, 9))


@pytest.mark.parametrize(
    ("name", "shares", "memory"),
    [*((name, IN_PARTS, None) for name in FAMILIES), ("llama", (1.0,), None), ("qwen3", IN_PARTS, 0)],
)
def test_it_gives_what_the_reference_gives(name, make_probes, draw_configuration, shares, memory):
    model = tiny.model_of(name)
    probes = make_probes(model, 6, batch_size=4)
    configurations = [{}, *some(dtm.components(model), draw_configuration, 25)]
    evaluator = evaluator_of(model, probes, shares, memory=memory)
    assert evaluator.engine == "layers in parts by torch, change"
    found = evaluator.measure(configurations, ())
    expected = dtm.ReferenceEvaluator(model, probes).measure(configurations)
    for ours, other in zip(found, expected, strict=True):
        assert ours.fdt.tolist() == other.fdt.tolist()
        # Of a change of some logits one in two hundred, as bfloat16 rounds.
        assert torch.allclose(ours.first_margin, other.first_margin, rtol=0.05, atol=0.05, equal_nan=True)
    assert len({fdt for other in expected for fdt in other.fdt.tolist()}) > 2  # or equality says little


def test_the_base_within_the_layers_is_kept_as_far_as_memory_goes(llama, make_probes):
    probes = make_probes(llama, 6)
    layers = evaluator_of(llama, probes)._layers
    # The model's states between the layers have one position more than is measured.
    between = (layers.depth + 1) * 6 * probes.tokens.shape[1] * layers.shape.hidden * 4
    (one, *_) = [sum(each.nbytes for each in vars(inner).values()) for inner in layers._inner.values()]
    for kept in range(layers.depth + 1):
        some_of_it = evaluator_of(llama, probes, memory=between + kept * one)._layers
        assert sorted(some_of_it._inner) == list(range(layers.depth - kept, layers.depth))


@pytest.mark.parametrize("memory", [None, 0])
def test_from_the_states_of_a_configuration_fdt_is_the_same(llama, make_probes, draw_configuration, memory):
    probes, paths = make_probes(llama, 6), dtm.components(llama)
    parent = dict.fromkeys(paths[::4], dtm.Int8()) | {UP: dtm.Prune(0.3)}
    configurations = [
        {},
        parent,
        *(parent | {path: dtm.Prune(0.5)} for path in paths[::2]),
        *({name: its for name, its in parent.items() if name != path} for path in parent),
        parent | {UP: dtm.W8A8()},
        *some(paths, draw_configuration, 5),
    ]
    expected = dtm.ReferenceEvaluator(llama, probes).measure(configurations, ())
    rebased = evaluator_of(llama, probes, memory=memory).rebased(parent, memory=memory)
    for ours, other in zip(rebased.measure(configurations, ()), expected, strict=True):
        assert ours.fdt.tolist() == other.fdt.tolist()


def test_a_treatment_of_the_input_is_left_to_transformers(evaluator):
    configurations = [{UP: dtm.W8A8()}, {UP: dtm.W8A8(), "model.layers.2.mlp.down_proj": dtm.Prune(0.5)}]
    expected = dtm.ReferenceEvaluator(evaluator.model, evaluator.probes).measure(configurations)
    for ours, other in zip(evaluator.measure(configurations, ()), expected, strict=True):
        assert ours.fdt.tolist() == other.fdt.tolist()


@pytest.mark.parametrize("by", ["fdt75", "fdt75+mean"])
def test_the_best_are_those_of_the_exhaustive_sweep(evaluator, by):
    candidates = [{path: dtm.Prune(0.5)} for path in evaluator.decoder.components]
    every = dtm.ReferenceEvaluator(evaluator.model, evaluator.probes).measure(candidates, ())

    def place(each):
        mean = -each.fdt.double().mean().item() if by == "fdt75+mean" else 0
        return -fdt75(each.fdt), mean, name_of(each.configuration)

    race = evaluator.best(candidates, 4, by=by)
    assert [each.configuration for each in race.best] == [
        each.configuration for each in sorted(every, key=place)[:4]
    ]


def test_a_measurement_has_the_same_bits_whatever_else_is_measured(evaluator, draw_configuration):
    configurations = some(list(evaluator.decoder.components), draw_configuration, 12)
    together = evaluator.measure(configurations, ())
    assert evaluator._first.doubts > 0
    for one, other in zip(together, evaluator.measure(configurations[::-1], ())[::-1], strict=True):
        assert_same(one, other)
        assert_same(one, evaluator.measure([one.configuration], ())[0])


def test_what_is_all_in_doubt_is_computed_exactly(llama, make_probes, draw_configuration, monkeypatch):
    monkeypatch.setattr(difference_error, "_ERROR", 1e6)
    probes = make_probes(llama, 6)
    configurations = some(dtm.components(llama), draw_configuration, 12)
    evaluator = evaluator_of(llama, probes)
    found = evaluator.measure(configurations, ())
    expected = dtm.ReferenceEvaluator(llama, probes).measure(configurations, ())
    assert evaluator._first.doubts >= len(configurations)
    for ours, other in zip(found, expected, strict=True):
        assert ours.fdt.tolist() == other.fdt.tolist()
        # Nothing of bfloat16 is in it: float32 sums over other numbers of rows.
        assert torch.allclose(ours.first_margin, other.first_margin, rtol=1e-5, atol=1e-5, equal_nan=True)


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_the_change_of_a_layer_is_that_of_its_exact_runs(name, make_probes):
    """Each projection treated, with and without a change before the layer, whole and in parts, and the last layer's."""
    model = tiny.model_of(name)
    layers = evaluator_of(model, make_probes(model, 4))._layers
    own, x = layers._layers[1], layers.base(1, range(4))
    rounded = [module.weight.bfloat16() for _, module in own.parts.projections]
    inner, out = base_states(own, x, {})
    # Float32 sums of up to 64 products in another order, of values of some units: a few of their last bits.
    torch.testing.assert_close(out, own.run(x, {})[0], rtol=2**-21, atol=2**-21)
    for index, (path, (_, module)) in enumerate(zip(own.paths, own.parts.projections, strict=True)):
        weight = dtm.Prune(0.4).compress(module.weight)
        treated = {index: TreatedWeight(weight.bfloat16(), (weight - module.weight).bfloat16())}
        for change in (None, 0.05 * torch.randn_like(x)):
            moved = x if change is None else x + change
            expected = own.run(moved, {path: weight})[0] - out
            whole, _ = run_change(own, x, inner, change, rounded, treated)
            # Products round what differs to eight bits, and a layer has four of them behind each other.
            assert float((whole - expected).norm() / expected.norm()) < 2**-7
            first, earlier = run_change(
                own,
                x[:, :7],
                inner.of(range(4), 0, 7),
                None if change is None else change[:, :7],
                rounded,
                treated,
            )
            rest, _ = run_change(
                own,
                x[:, 7:],
                inner.of(range(4), 7, x.shape[1]),
                None if change is None else change[:, 7:],
                rounded,
                treated,
                earlier,
            )
            parts = torch.cat([first, rest], dim=1)
            # float32 sums over other numbers of rows may move what is rounded to its neighbour: now and then 2^-9.
            assert float((parts - whole).norm() / whole.norm()) < 2**-8
            tail, _ = run_change(own, x, inner, change, rounded, treated, skip=5)
            assert float((tail[:, 5:] - whole[:, 5:]).norm() / whole.norm()) < 2**-8
            assert not tail[:, :5].any()


def test_a_nan_fails_its_configuration_and_no_other(evaluator):
    good = [{UP: dtm.Int8()}, {UP: dtm.Prune(0.5)}]
    expected, finished = evaluator.measure(good, ()), []
    with pytest.raises(MeasurementError, match=rf"^{UP} under ruin: .* not finite$"):
        finished.extend(evaluator.iterate([good[0], {UP: Ruin()}, good[1]], ()))
    for one, other in zip(finished, expected, strict=True):
        assert_same(one, other)


def test_only_a_float32_model_of_llamas_kind_is_read_so(llama, make_probes):
    probes = make_probes(llama, 2)
    with pytest.raises(ModelError, match=r"the model is in torch\.bfloat16, and differences are for float32"):
        dtm.Evaluator(llama.bfloat16(), probes, layers="differences")
    other = tiny.model_of("gpt2")
    with pytest.raises(ModelError, match="GPT2Block is no layer that"):
        dtm.Evaluator(other, make_probes(other, 2), layers="differences")


@pytest.mark.model
def test_on_smollm2_fdt_is_that_of_exact_layers(smollm2):
    model, tokenizer = smollm2
    probes = dtm.Probes.from_text(model, tokenizer, dtm.read_documents(), 24, 24, 4)
    paths = dtm.components(model)
    configurations = [
        {path: treatment} for path in paths[5::70] for treatment in (dtm.Int8(), dtm.Prune(0.5))
    ]
    configurations.append(dict.fromkeys(paths[::7], dtm.Int8()))
    expected = dtm.Evaluator(model, probes).measure(configurations, ())
    for ours, other in zip(evaluator_of(model, probes).measure(configurations, ()), expected, strict=True):
        assert ours.fdt.tolist() == other.fdt.tolist()
    assert len({fdt for other in expected for fdt in other.fdt.tolist()}) > 2
