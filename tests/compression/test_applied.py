import pytest
import tiny
import torch

from dtm_fast import GPTQ, W8A8, Calibration, Drop, Int4, Int8, LLMInt8, Prune, SparseGPT
from dtm_fast.compression import Change
from dtm_fast.errors import ComponentError, TreatmentError
from dtm_fast.model import Decoder, model_identity

TREATMENTS = [Int8(), Prune(0.5), W8A8(), LLMInt8(1), Int4(16), Drop()]
OF_INPUTS = [Prune("2:4", "wanda"), SparseGPT(0.5), GPTQ(16)]


def outputs(decoder: Decoder) -> dict[str, torch.Tensor]:
    """What each component makes of the same random input."""
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        return {path: c.module(x[:, : c.weight.shape[1]]) for path, c in decoder.components.items()}


@pytest.mark.parametrize("treatment", TREATMENTS)
def test_exactly_the_named_component_multiplies_otherwise(family, treatment):
    decoder = Decoder.of(tiny.model_of(family))
    before = outputs(decoder)
    for changed in list(decoder.components)[-4:]:
        with Change(decoder, {changed: treatment}):
            now = outputs(decoder)
        assert [path for path in before if not torch.equal(before[path], now[path])] == [changed]


@pytest.mark.parametrize("treatment", TREATMENTS)
def test_it_multiplies_by_the_compressed_weight(family, treatment):
    decoder = Decoder.of(tiny.model_of(family))
    path, component = list(decoder.components.items())[-1]
    x = torch.randn(3, component.weight.shape[1], generator=torch.Generator().manual_seed(7))
    bias = component.module.bias
    expected = treatment.compress_input(x) @ treatment.compress(component.weight).T
    with Change(decoder, {path: treatment}):
        found = component.module(x)
    torch.testing.assert_close(found, expected + (0 if bias is None else bias), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("treatment", OF_INPUTS, ids=lambda each: each.key)
def test_what_looks_at_inputs_is_given_the_components_own(family, treatment):
    model = tiny.model_of(family)
    tokens = torch.randint(3, tiny.VOCABULARY, (3, 20), generator=torch.Generator().manual_seed(1))
    decoder = Decoder.of(model, Calibration.collect(model, tokens, cache=False))
    before = model_identity(model)
    for path, component in list(decoder.components.items())[-4:]:
        expected = treatment.compress(component.weight, component.inputs)
        with Change(decoder, {path: treatment}):
            assert torch.equal(component.weight, expected)
    assert model_identity(model) == before


@pytest.mark.parametrize("treatment", TREATMENTS)
def test_undoing_restores_every_bit_and_hook(family, treatment):
    model = tiny.model_of(family)
    decoder = Decoder.of(model)
    before, storages = model_identity(model), [p.data_ptr() for p in model.parameters()]
    change = Change(decoder, dict.fromkeys(decoder.components, treatment))
    with change:
        assert model_identity(model) != before
    assert model_identity(model) == before
    assert [p.data_ptr() for p in model.parameters()] == storages
    assert not any(c.module._forward_pre_hooks for c in decoder.components.values())


def test_an_exception_inside_undoes_too(family):
    model = tiny.model_of(family)
    decoder = Decoder.of(model)
    before = model_identity(model)
    with pytest.raises(KeyboardInterrupt), Change(decoder, dict.fromkeys(decoder.components, W8A8())):
        raise KeyboardInterrupt
    assert model_identity(model) == before
    assert not any(c.module._forward_pre_hooks for c in decoder.components.values())


def test_making_a_change_does_not_change_the_model(llama):
    before = model_identity(llama)
    decoder = Decoder.of(llama)
    Change(decoder, dict.fromkeys(decoder.components, Prune(1)))
    assert model_identity(llama) == before


def test_a_change_can_be_put_in_again(llama):
    decoder = Decoder.of(llama)
    change = Change(decoder, {"model.layers.0.mlp.up_proj": Prune(0.5)})
    with change:
        first = model_identity(llama)
    with change:
        assert model_identity(llama) == first


def test_a_change_that_is_in_cannot_be_put_in_and_is_taken_out_once(llama):
    before, decoder = model_identity(llama), Decoder.of(llama)
    change = Change(decoder, {"model.layers.0.mlp.up_proj": Int8()})
    with change:
        with pytest.raises(RuntimeError, match="already in the model"):
            change.__enter__()
        assert model_identity(llama) != before
    assert model_identity(llama) == before


def test_nested_changes_of_one_component_are_undone_in_turn(llama):
    decoder, path = Decoder.of(llama), "model.layers.0.mlp.up_proj"
    before = model_identity(llama)
    with Change(decoder, {path: Prune(0.5)}):
        half = model_identity(llama)
        with Change(decoder, {path: Prune(1)}):
            assert not decoder.component(path).weight.any()
        assert model_identity(llama) == half
    assert model_identity(llama) == before


@pytest.mark.parametrize(
    ("configuration", "error"),
    [({"lm_head": Int8()}, ComponentError), ({"model.layers.0.mlp.up_proj": "int8"}, TreatmentError)],
)
def test_what_does_not_fit_is_refused_before_anything_is_compressed(llama, configuration, error):
    with pytest.raises(error):
        Change(Decoder.of(llama), configuration)


def test_gradients_of_the_parameters_stay_their_own(llama):
    decoder, path = Decoder.of(llama), "model.layers.0.mlp.up_proj"
    parameter = decoder.component(path).parameter
    with Change(decoder, {path: Int8()}):
        assert decoder.component(path).parameter is parameter
    assert parameter.requires_grad
