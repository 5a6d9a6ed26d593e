"""What differences err by on models unlike the one that they were measured on, and changes too large for them."""

import math

import pytest
import tiny
import torch

import dtm_fast as dtm
from dtm_fast.measure.compressed_weights import relative_change
from dtm_fast.measure.difference_error import LARGEST_CHANGE, changes_much
from dtm_fast.measure.prefix_tree import layers_of
from dtm_fast.ops.layer_weights import Arithmetic, has_arithmetic

pytestmark = pytest.mark.once

UP, DOWN = "model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"
ENGINES = ["auto", "differences"]


def evaluator_of(model, probes, layers: str = "differences") -> dtm.Evaluator:
    if layers == "auto" and not has_arithmetic(Arithmetic.CHANGE):
        pytest.skip("no kernel for layers by differences")
    evaluator = dtm.Evaluator(model, probes, layers=layers)
    assert evaluator._layers.arithmetic == Arithmetic.CHANGE
    return evaluator


def with_sharp_attention(model):
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                weight *= 5
    return model


def with_a_massive_channel(model, size: float = 1000.0):
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[5] *= size
    return model


@pytest.mark.parametrize("engine", ENGINES)
def test_the_error_of_a_model_like_those_that_were_measured_is_as_it_was(llama, make_probes, engine):
    assert 1 <= evaluator_of(llama, make_probes(llama, 4), engine)._scale < 2


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("change", [with_sharp_attention, with_a_massive_channel])
def test_a_model_on_which_rounding_weighs_more_is_allowed_more(llama, make_probes, change, engine):
    scale = evaluator_of(change(llama), make_probes(llama, 4), engine)._scale
    assert scale is None or scale > 2


@pytest.mark.parametrize("engine", ENGINES)
def test_where_differences_are_of_no_use_all_is_exact(llama, make_probes, engine, monkeypatch):
    monkeypatch.setattr("dtm_fast.measure.difference_error._TOO_FAR", 0.5)
    probes = make_probes(llama, 4)
    evaluator = evaluator_of(llama, probes, engine)
    assert evaluator.engine.endswith("change (without differences: their error is too large on this model)")
    configurations = [{UP: dtm.Prune(0.5)}, {UP: dtm.Int8(), DOWN: dtm.Drop()}]
    rebased = evaluator.rebased(configurations[0])
    expected = dtm.ReferenceEvaluator(llama, probes).measure(configurations, ())
    for ours in (evaluator, rebased):
        found = ours.measure(configurations, ())
        assert [each.fdt.tolist() for each in found] == [each.fdt.tolist() for each in expected]
        assert ours._first.doubts == 0


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("treatment", [dtm.Drop(), dtm.Prune(1.0), dtm.Prune(0.99)])
def test_norms_of_heads_that_hardly_anything_enters(make_probes, engine, treatment):
    """q = q_base + Δq with Δq rounded: where q should be 0 the norm made that rounding as large as q_base."""
    model = tiny.model_of("qwen3")
    probes = make_probes(model, 8)
    configurations = [{p: treatment} for p in dtm.components(model) if p.endswith(("q_proj", "k_proj"))]
    found = evaluator_of(model, probes, engine).measure(configurations, ())
    expected = dtm.ReferenceEvaluator(model, probes).measure(configurations, ())
    assert [each.fdt.tolist() for each in found] == [each.fdt.tolist() for each in expected]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("change", [with_sharp_attention, with_a_massive_channel])
def test_models_on_which_rounding_weighs_more_are_measured_right(llama, make_probes, change, engine):
    probes = make_probes(change(llama), 8)
    treatments = (dtm.Drop(), dtm.Int4(8), dtm.Prune(0.5), dtm.Prune(0.99))
    configurations = [{p: treatment} for p in dtm.components(llama) for treatment in treatments]
    found = evaluator_of(llama, probes, engine).measure(configurations, ())
    expected = dtm.ReferenceEvaluator(llama, probes).measure(configurations, ())
    assert [each.fdt.tolist() for each in found] == [each.fdt.tolist() for each in expected]


@pytest.mark.parametrize("engine", ENGINES)
def test_what_changes_a_weight_much(llama, make_probes, engine):
    evaluator = evaluator_of(llama, make_probes(llama, 2), engine)

    def much(ours: dtm.Evaluator, configuration: dict[str, dtm.Treatment]) -> bool:
        return changes_much(ours._layers, layers_of(ours.decoder, configuration))

    assert not much(evaluator, {})
    assert not much(evaluator, {UP: dtm.Prune(0.5), DOWN: dtm.Int8()})
    assert much(evaluator, {UP: dtm.Prune(0.5), DOWN: dtm.Drop()})
    assert much(evaluator, {UP: dtm.Prune(0.95)})
    weight = llama.get_submodule(UP).weight.detach()
    pruned = dtm.Prune(0.5).compress(weight)
    expected = float((pruned - weight).norm() / weight.norm())
    found = evaluator._layers.largest_change({1: {UP: dtm.Prune(0.5), DOWN: dtm.Int8()}})
    assert found == pytest.approx(expected, rel=1e-5)
    # From the states of another configuration it is that configuration's weight which changes.
    rebased = evaluator.rebased({UP: dtm.Drop(), DOWN: dtm.Int8()})
    assert not much(rebased, {UP: dtm.Drop(), DOWN: dtm.Prune(0.5)})
    assert much(rebased, {})
    assert math.isinf(rebased._layers.largest_change({}))


def test_the_relative_change_of_a_weight():
    weight = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    assert relative_change(torch.zeros(2, 2), weight) == 0
    assert relative_change(torch.zeros(2, 2), torch.zeros(2, 2)) == 0
    assert relative_change(-weight, weight) == 1 > LARGEST_CHANGE
    assert relative_change(weight, torch.zeros(2, 2)) == math.inf
