"""The layers in place of every decoder Linear of a Hugging Face model.

What is equal to what, bit for bit:
- Int8Linear quantizes weights to the values of the treatment W8A8, and the whole model gives the same logits on
  every instruction set as on the reference twins, for all its sums are exact.
- MaskedLinear on the reference twins gives the logits of the treatment Prune: it is the same torch product.
What is only close:
- A MaskedLinear kernel sums in another order than torch: logits are equal up to float32 rounding.
- Int8Linear against W8A8, which multiplies the dequantized values in floats: one layer, for the same input, is
  equal up to that product's rounding. Over many layers this grows, because a value at the edge of an int8 step
  falls on the other side of it; then the logits differ by part of what quantization itself does to them.
"""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
import torch.nn.functional as F

import dtm_fast as dtm
from dtm_fast import nn
from dtm_fast.compression import Change, Treatment
from dtm_fast.model import Decoder
from dtm_fast.ops import native

TEXT = "The river was low that summer, and the boats lay on the mud below the old mill. " * 3
HALF = dtm.Prune(0.5)


@pytest.fixture
def kernels() -> None:
    reason = native.why_no_cpu_kernels()
    if reason is not None:
        pytest.skip(reason)


def replaced(
    model: torch.nn.Module, layer_of: Callable[[torch.nn.Linear], torch.nn.Module]
) -> torch.nn.Module:
    """A copy of a model with a layer in place of every linear component."""
    model = copy.deepcopy(model)
    for path in dtm.components(model):
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, layer_of(model.get_submodule(path)))
    return model


def pruned(linear: torch.nn.Linear) -> nn.MaskedLinear:
    return nn.MaskedLinear.from_linear(linear, HALF.compress(linear.weight.detach()) != 0)


def everywhere(model: torch.nn.Module, treatment: Treatment) -> Change:
    """The treatment of every component."""
    return Change(Decoder.of(model), dict.fromkeys(dtm.components(model), treatment))


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.fixture
def tokens(smollm2) -> torch.Tensor:
    _, tokenizer = smollm2
    ids = torch.tensor(tokenizer(TEXT)["input_ids"][:40])
    return torch.stack([ids, ids.flip(0)])


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def model(request: pytest.FixtureRequest, smollm2) -> torch.nn.Module:
    loaded, _ = smollm2
    return loaded if request.param == torch.float32 else copy.deepcopy(loaded).to(request.param)


@torch.no_grad()
def logits(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return model(input_ids=tokens, use_cache=False).logits


@pytest.mark.model
def test_masked_layers_give_what_pruning_gives(kernels: None, model, tokens: torch.Tensor) -> None:
    masked = replaced(model, pruned)
    with everywhere(model, HALF):
        treated = logits(model, tokens)
    with native.use_cpu_isa("reference"):
        assert torch.equal(logits(masked, tokens), treated)
    found = logits(masked, tokens)
    if model.dtype == torch.float32:
        assert distance(found, treated) < 2**-17
    # Another order of the sums now and then rounds to another bfloat16; no treatment does so little.
    assert distance(found, treated) < 2**-5
    back = replaced(model, lambda linear: pruned(linear).to_linear())
    assert torch.equal(logits(back, tokens), treated)


@pytest.mark.model
def test_int8_layers_give_the_same_bits_on_every_backend(kernels: None, model, tokens: torch.Tensor) -> None:
    quantized = replaced(model, nn.Int8Linear.from_linear)
    found = logits(quantized, tokens)
    with native.use_cpu_isa("reference"):
        assert torch.equal(logits(quantized, tokens), found)
    base = logits(model, tokens)
    with everywhere(model, dtm.W8A8()):
        treated = logits(model, tokens)
    assert distance(found, treated) < distance(treated, base)


@pytest.mark.model
@torch.no_grad()
def test_each_int8_layer_is_as_near_to_w8a8_as_float32_allows(
    kernels: None, smollm2, tokens: torch.Tensor
) -> None:
    model, _ = smollm2
    decoder, inputs, outputs = Decoder.of(model), {}, {}
    linears = {path: component.module for path, component in decoder.components.items()}
    quantized = {path: nn.Int8Linear.from_linear(each) for path, each in linears.items()}
    hooks = []
    for path, linear in linears.items():
        # Registered before the treatment's own hook, so that it sees what is not yet quantized.
        hooks.append(
            linear.register_forward_pre_hook(lambda _, x, path=path: inputs.update({path: x[0].clone()}))
        )
        hooks.append(linear.register_forward_hook(lambda _, x, y, path=path: outputs.update({path: y})))
    try:
        with everywhere(model, dtm.W8A8()):
            logits(model, tokens)
    finally:
        for hook in hooks:
            hook.remove()
    treatment = dtm.W8A8()
    for path, layer in quantized.items():
        x, weight = treatment.compress_input(inputs[path]), treatment.compress(linears[path].weight)
        assert torch.equal(layer.to_linear().weight, weight)
        magnitude = F.linear(x.abs(), weight.abs())
        assert bool(((layer(inputs[path]) - outputs[path]).abs() <= 2**-20 * magnitude).all())


@pytest.mark.parametrize("layer_of", [nn.Int8Linear.from_linear, pruned], ids=["int8", "masked"])
@pytest.mark.parametrize("family", ["llama", "opt", "gpt_neox"])
def test_other_models_run_write_and_are_saved_with_them(
    family: str, layer_of: Callable[..., torch.nn.Module]
) -> None:
    model = replaced(tiny.model_of(family), layer_of)
    tokens = torch.arange(3, 13)[None]
    found = logits(model, tokens)
    written = model.generate(tokens, max_new_tokens=4, do_sample=False)
    assert torch.equal(written[:, :10], tokens)
    assert int(written[0, 10]) == int(found[0, -1].argmax())
    other = replaced(tiny.model_of(family, seed=1), layer_of)
    assert not torch.equal(logits(other, tokens), found)
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other, tokens), found)
    assert logits(other.to(torch.bfloat16), tokens).dtype == torch.bfloat16


def test_the_example_of_the_readme() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    example = readme.partition("## Use the kernels as layers")[2].split("```")[1].removeprefix("python")
    model, linear = tiny.model_of("llama"), torch.nn.Linear(16, 8)
    names = {"model": model, "linear": linear, "mask": torch.rand(8, 16) < 0.5, "x": torch.randn(3, 16)}
    exec(example, names)
    assert linear.weight.grad is not None
    assert torch.equal(linear.weight.grad != 0, names["mask"])
    assert sum(isinstance(each, nn.Int8Linear) for each in model.modules()) == 7 * tiny.LAYERS
