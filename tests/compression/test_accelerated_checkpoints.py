"""Training an accelerated model, accelerating a pruned checkpoint, and SmolLM2."""

import copy

import pytest
import tiny
import torch
import torch.nn.functional as F
from acceleration import (
    MIXED,
    TOKENS,
    UP,
    error,
    everywhere,
    layers_of,
    logits,
    treated_logits,
    uncached,
    unchanged,
    use,
    with_hook,
)
from transformers.pytorch_utils import Conv1D

import dtm_fast as dtm
from dtm_fast import nn
from dtm_fast.compression import (
    W8A8,
    Int8,
    Prune,
    break_even,
)
from dtm_fast.compression.accelerated import accelerate, restore
from dtm_fast.model import Decoder, model_identity

# Training.


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_pruned_components_are_trained_and_restoring_forgets_it(family: str) -> None:
    model = tiny.model_of(family)
    before, base = model_identity(model), logits(model)
    paths = dtm.components(model)
    configuration = everywhere(model, Prune(0.5), Int8())
    treated = treated_logits(model, configuration)
    accelerate(model, configuration, trainable=True)
    pruned, quantized = layers_of(model, paths[::2]), layers_of(model, paths[1::2])
    assert {type(each) for each in pruned} == {nn.MaskedLinear}
    assert {type(each) for each in quantized} == {Conv1D if family == "gpt2" else torch.nn.Linear}
    assert error(logits(model), treated) < 2**-17
    trained = [each.weight for each in pruned]
    zeros = [each == 0 for each in trained]
    weights = [each.weight.clone() for each in pruned + quantized]
    model.train()
    optimizer = torch.optim.SGD(trained, lr=0.01)
    for _ in range(2):
        F.cross_entropy(model(TOKENS[:, :-1]).logits.mT, TOKENS[:, 1:]).backward()
        optimizer.step()
        assert all(each.weight.grad is None for each in quantized)
    for weight, zero, old in zip(trained, zeros, weights, strict=False):
        assert torch.equal(weight == 0, zero)
        assert not torch.equal(weight, old)
    for layer, old in zip(quantized, weights[len(pruned) :], strict=True):
        assert torch.equal(layer.weight, old)
    model.eval()
    restore(model)
    # Nothing but the layers was given to the optimizer.
    assert model_identity(model) == before
    assert torch.equal(logits(model), base)


def test_layers_made_in_inference_mode_are_ordinary_ones(sparse_pays: None, model) -> None:
    with torch.inference_mode():
        accelerate(model, everywhere(model, *MIXED))
    for path in dtm.components(tiny.model_of(model.config.model_type)):
        assert not any(each.is_inference() for each in model.get_submodule(path).state_dict().values())
    restore(model)
    with torch.inference_mode():
        accelerate(model, everywhere(model, Prune(0.5)), trainable=True)
    model(TOKENS).logits.square().mean().backward()
    assert all(each.grad is not None for each in model.parameters())


# Without a plan.


def prune_in_place(model: torch.nn.Module, paths) -> None:
    decoder = Decoder.of(model)
    for path in paths:
        component = decoder.component(path)
        component.weight.copy_(Prune(0.75).compress(component.weight))


def test_a_pruned_checkpoint_goes_to_sparse_layers_and_the_rest_stays(
    kernels: None, sparse_pays: None, model
) -> None:
    paths = dtm.components(model)
    prune_in_place(model, paths[::2])
    before, base, stay = model_identity(model), logits(model), layers_of(model, paths[1::2])
    report = accelerate(model)
    assert list(report.components) == paths
    for path in paths[::2]:
        assert type(model.get_submodule(path)) is nn.SparseLinear
        assert report.components[path].layer == "SparseLinear"
        assert "density 0.25" in report.components[path].reason
    for path, module in zip(paths[1::2], stay, strict=True):
        assert model.get_submodule(path) is module
        assert report.components[path].layer == type(module).__name__
        assert (
            "density 1.00; a sparse product is faster below 0.9, no dense one"
            in report.components[path].reason
        )
    assert error(logits(model), base) < 2**-17
    restore(model)
    assert model_identity(model) == before


def test_dense_weights_go_to_a_masked_layer_where_that_is_faster(
    kernels: None, model, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, break_even.BreakEven(token=0.9, prompt=0.9, both=0.9, full=True))
    before, base = model_identity(model), logits(model)
    paths = dtm.components(model)
    originals = layers_of(model, paths)
    accelerate(model)
    for path, original in zip(paths, originals, strict=True):
        layer = model.get_submodule(path)
        assert type(layer) is nn.MaskedLinear
        assert (layer.weight is original.weight) == isinstance(original, torch.nn.Linear)
    assert error(logits(model), base) < 2**-17
    expected = model_identity(copy.deepcopy(tiny.model_of(model.config.model_type)).to(torch.bfloat16))
    model.to(torch.bfloat16)
    restore(model)
    assert model_identity(model) == expected != before


def test_small_weights_stay_and_the_report_says_why(model) -> None:
    before = unchanged(model)
    report = accelerate(model)
    assert len(report.components) == len(dtm.components(model))
    for each in report.components.values():
        assert each.layer in ("Linear", "Conv1D")
        assert "too small" in each.reason or "cannot run" in each.reason
    restore(model)
    assert unchanged(model) == before


def test_components_that_cannot_be_replaced_stay_with_the_reason(
    kernels: None, sparse_pays: None, llama
) -> None:
    prune_in_place(llama, dtm.components(llama))
    with_hook(llama)
    report = accelerate(llama)
    assert report.components[UP] == ("Linear", "it has hooks, which a layer in its place would not have")
    assert {each.layer for path, each in report.components.items() if path != UP} == {"SparseLinear"}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_pruned_checkpoint_is_trained_masked(family: str) -> None:
    model = tiny.model_of(family)
    paths = dtm.components(model)
    prune_in_place(model, paths[::2])
    before = model_identity(model)
    report = accelerate(model, trainable=True)
    for index, path in enumerate(paths):
        layer = model.get_submodule(path)
        assert (type(layer) is nn.MaskedLinear) == (index % 2 == 0)
        if index % 2 == 0:
            layer.weight.data.add_(1)  # of the layer alone
            assert layer.weight.is_contiguous()
        else:
            assert report.components[path].reason == "density 1.00; not pruned"
    restore(model)
    assert model_identity(model) == before


# The table, on the model of which it was made.


@pytest.mark.model
def test_smollm2_writes_the_same_with_and_without_a_cache(kernels: None, smollm2) -> None:
    model, tokenizer = smollm2
    layers = [f"model.layers.{index}." for index in (0, 14, 29)]
    paths = [path for path in dtm.components(model) if any(each in path for each in layers)]
    originals = layers_of(model, paths)
    report = accelerate(model, {path: Prune(0.85) if "mlp" in path else W8A8() for path in paths})
    try:
        assert {report.components[path].layer for path in paths if "mlp" in path} == {"SparseLinear"}
        assert {report.components[path].layer for path in paths if "mlp" not in path} == {"Int8Linear"}
        tokens = torch.tensor(tokenizer("The river was low that summer, and").input_ids)[None]
        written = model.generate(
            tokens, max_new_tokens=6, min_new_tokens=6, do_sample=False, eos_token_id=None
        )
        assert torch.equal(written, uncached(model, tokens, 6))
    finally:
        restore(model)
    assert layers_of(model, paths) == originals
