"""Evaluators that start from the states of a configuration instead of the model's."""

import pytest
import tiny
import torch
import transformers
from measurements import assert_same, needs_kernels, some

import dtm_fast as dtm
from dtm_fast.compression import name_of
from dtm_fast.errors import ComponentError
from dtm_fast.measure import Probes
from dtm_fast.measure.fused_layers import FusedLayers
from dtm_fast.ops import native
from dtm_fast.ops.layer_weights import Arithmetic, has_arithmetic

UP = "model.layers.1.mlp.up_proj"


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory", [None, 0, 100_000])
def test_from_the_states_of_a_configuration_fdt_is_the_same(make_probes, draw_configuration, dtype, memory):
    if not has_arithmetic(Arithmetic.FLOAT32 if dtype == torch.float32 else Arithmetic.BFLOAT16):
        pytest.skip(f"{native.cpu_isa()} has no kernel for layers in {dtype}")
    model = tiny.model_of("llama").to(dtype)
    evaluator = dtm.Evaluator(model, make_probes(model, 6))
    paths = dtm.components(model)
    parent = dict.fromkeys(paths[::2], dtm.Int8()) | {UP: dtm.Prune(0.3)}
    configurations = [
        {},
        parent,
        *(parent | {path: treatment} for path in paths for treatment in (dtm.Int8(), dtm.Prune(0.5))),
        *({name: its for name, its in parent.items() if name != path} for path in parent),
        parent | {UP: dtm.W8A8()},
        *some(paths, draw_configuration, 5),
    ]
    rebased = evaluator.rebased(parent, memory=memory)
    found, expected = rebased.measure(configurations, ()), evaluator.measure(configurations, ())
    assert [each.fdt.tolist() for each in found] == [each.fdt.tolist() for each in expected]
    for ours, other in zip(found, expected, strict=True):
        assert torch.allclose(ours.first_margin, other.first_margin, rtol=0.05, atol=0.05, equal_nan=True)
    assert_same(rebased.measure([parent], ("sdt",))[0], evaluator.measure([parent], ("sdt",))[0])
    best = [evaluator.best(configurations[:-6], 4), rebased.best(configurations[:-6], 4)]
    assert [name_of(each.configuration) for each in best[0].best] == [
        name_of(each.configuration) for each in best[1].best
    ]
    again = rebased.rebased(configurations[5], memory=memory).measure(configurations[5:6], ())
    assert again[0].fdt.tolist() == expected[5].fdt.tolist()


@needs_kernels
@pytest.mark.parametrize("layers", ["fused", "differences"])
def test_far_from_the_states_it_starts_from_fdt_is_the_same(layers):
    # Of so many tokens and so far away most rows have more rivals than are looked at first.
    torch.manual_seed(0)
    sizes = {"hidden_size": 96, "intermediate_size": 160, "num_attention_heads": 3, "num_key_value_heads": 1}
    config = transformers.LlamaConfig(
        vocab_size=3000, num_hidden_layers=3, initializer_range=0.1, max_position_embeddings=512, **sizes
    )
    model = transformers.LlamaForCausalLM(config).eval()
    probes = Probes._complete(model, torch.randint(0, 3000, (6, 4)), 200, 8)
    paths = dtm.components(model)
    candidates = [{path: dtm.Int8()} for path in paths]
    expected = dtm.ReferenceEvaluator(model, probes).measure(candidates, ())
    rebased = dtm.Evaluator(model, probes, layers=layers).rebased(dict.fromkeys(paths, dtm.Prune(0.6)))
    found = rebased.measure(candidates, ())
    assert [each.fdt.tolist() for each in found] == [each.fdt.tolist() for each in expected]
    assert not any(bool((each.first_margin < 0).any()) for each in found)


@needs_kernels
def test_the_memory_of_states_that_are_needed_no_more_is_used_again(llama, make_probes):
    evaluator = dtm.Evaluator(llama, make_probes(llama, 6))
    paths = dtm.components(llama)
    first, second = (dict.fromkeys(paths[start::2], dtm.Int8()) for start in (0, 1))
    expected = [each.fdt.tolist() for each in evaluator.measure([first, second], ())]
    one = evaluator.rebased(first, instead_of=evaluator)
    inner = one._layers._inner
    where = {state.data_ptr() for each in inner.values() for state in each.tensors() if state is not None}
    other = one.rebased(second, instead_of=one)
    inner = other._layers._inner
    assert where == {
        state.data_ptr() for each in inner.values() for state in each.tensors() if state is not None
    }
    for each in (one, other, evaluator):
        assert [measurement.fdt.tolist() for measurement in each.measure([first, second], ())] == expected
    assert one.rebased(first, instead_of=other).measure([second], ())[0].fdt.tolist() == expected[1]
    with pytest.raises(ValueError, match="instead_of was not made from this evaluator"):
        evaluator.rebased(first, instead_of=dtm.Evaluator(llama, make_probes(llama, 6)))


@needs_kernels
def test_from_the_states_of_a_configuration_only_what_differs_is_run(llama, make_probes):
    evaluator = dtm.Evaluator(llama, make_probes(llama, 6))
    parent = dict.fromkeys(dtm.components(llama)[::2], dtm.Int8())
    last = f"model.layers.{len(evaluator.decoder.layers) - 1}.mlp.up_proj"
    rebased = evaluator.rebased(parent)
    rebased.measure([parent, parent | {last: dtm.Prune(0.5)}], ())
    assert rebased.layer_evaluations == 1


@needs_kernels
def test_from_the_states_of_a_configuration_probes_are_read_to_where_it_diverges_at_first(
    llama, make_probes, monkeypatch
):
    probes = make_probes(llama, 6)
    evaluator = dtm.Evaluator(llama, probes)
    parent = dict.fromkeys(dtm.components(llama)[::2], dtm.Prune(0.3))
    diverges = evaluator.measure([parent], ())[0].fdt.tolist()
    assert len(set(diverges)) > 2
    assert min(diverges) < probes.completion - 1
    read: list[list[int]] = []
    run = FusedLayers.run

    def counted(self, *given, lengths=None, **more):
        if lengths is not None and "kv" not in more:  # not of what is in doubt
            read.append(list(lengths))
        return run(self, *given, lengths=lengths, **more)

    rebased = evaluator.rebased(parent)
    monkeypatch.setattr(FusedLayers, "run", counted)
    last = f"model.layers.{len(evaluator.decoder.layers) - 1}.mlp.up_proj"
    rebased.measure([parent | {last: dtm.Int8()}], ())
    assert read[0] == [probes.prefix - 1 + min(at + 1, probes.completion) for at in diverges]


@needs_kernels
def test_states_to_start_from_that_cannot_be_had_are_refused(llama, make_probes):
    probes = make_probes(llama, 6)
    with pytest.raises(ValueError, match="only layers of our own can start from other states"):
        dtm.Evaluator(llama, probes, layers="transformers").rebased({UP: dtm.Int8()})
    with pytest.raises(ValueError, match=f"do not know w8a8.* of {UP}"):
        dtm.Evaluator(llama, probes).rebased({UP: dtm.W8A8()})
    with pytest.raises(ComponentError):
        dtm.Evaluator(llama, probes).rebased({"lm_head": dtm.Int8()})
