import pytest
import tiny
import torch
from torch import nn

import dtm_fast as dtm
from dtm_fast.errors import ComponentError, ModelError
from dtm_fast.model import Decoder

ATTENTION = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
GATED = [*ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
FUSED = ["self_attn.o_proj", "self_attn.qkv_proj", "mlp.gate_up_proj", "mlp.down_proj"]
OPT = ["self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj", "self_attn.out_proj", "fc1", "fc2"]
GPT2 = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
NEOX = ["attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"]

EXPECTED = {
    "llama": ("model.layers", GATED),
    "mistral": ("model.layers", GATED),
    "qwen2": ("model.layers", GATED),
    "qwen3": ("model.layers", GATED),
    "gemma2": ("model.layers", GATED),
    "phi3": ("model.layers", FUSED),
    "opt": ("model.decoder.layers", OPT),
    "gpt2": ("transformer.h", GPT2),
    "gpt_neox": ("gpt_neox.layers", NEOX),
}
SHAPES = {  # [N, K] of matrices whose two sides differ
    "llama": {"self_attn.k_proj": (16, 32), "mlp.up_proj": (64, 32), "mlp.down_proj": (32, 64)},
    "phi3": {"self_attn.qkv_proj": (64, 32), "mlp.gate_up_proj": (128, 32), "mlp.down_proj": (32, 64)},
    "opt": {"fc1": (64, 32), "fc2": (32, 64)},
    "gpt2": {"attn.c_attn": (96, 32), "mlp.c_fc": (128, 32), "mlp.c_proj": (32, 128)},
    "gpt_neox": {"attention.query_key_value": (96, 32), "mlp.dense_4h_to_h": (32, 64)},
}


def test_components_are_the_weight_matrices_in_depth_order(family):
    layers, names = EXPECTED[family]
    expected = [f"{layers}.{layer}.{name}" for layer in range(tiny.LAYERS) for name in names]
    assert dtm.components(tiny.model_of(family)) == expected


def test_a_component_knows_its_layer_and_its_name_there(family):
    _, names = EXPECTED[family]
    decoder = Decoder.of(tiny.model_of(family))
    assert [(c.layer, c.name) for c in decoder.components.values()] == [
        (layer, name) for layer in range(tiny.LAYERS) for name in names
    ]


@pytest.mark.parametrize("family", SHAPES)
def test_weights_are_seen_as_output_channels_by_inputs(family):
    decoder = Decoder.of(tiny.model_of(family))
    seen = {c.name: tuple(c.weight.shape) for c in decoder.components.values()}
    assert {name: seen[name] for name in SHAPES[family]} == SHAPES[family]


def test_the_weight_is_a_view_and_multiplies_as_the_module_does(family):
    x = torch.randn(2, 128, generator=torch.Generator().manual_seed(1))
    for component in Decoder.of(tiny.model_of(family)).components.values():
        weight, bias = component.weight, component.module.bias
        assert weight.data_ptr() == component.parameter.data_ptr()
        inputs = x[:, : weight.shape[1]]
        expected = inputs @ weight.T + (0 if bias is None else bias)
        torch.testing.assert_close(component.module(inputs), expected, rtol=1e-5, atol=1e-5)


def test_the_layers_are_those_of_the_model(family):
    model = tiny.model_of(family)
    decoder = Decoder.of(model)
    assert len(decoder.layers) == tiny.LAYERS
    assert decoder.layers == tuple(model.get_submodule(EXPECTED[family][0]))


def test_numel_counts_the_weights_without_the_bias():
    decoder = Decoder.of(tiny.model_of("gpt2"))
    assert decoder.component("transformer.h.0.attn.c_attn").numel == 32 * 96


def test_an_unknown_component_is_answered_with_the_nearest_names():
    decoder = Decoder.of(tiny.model_of("llama"))
    with pytest.raises(ComponentError, match=r"'model\.layers\.1\.mlp\.up'.*model\.layers\.1\.mlp\.up_proj"):
        decoder.component("model.layers.1.mlp.up")


@pytest.mark.parametrize("path", [None, 3, ["model.layers.0.mlp.up_proj"]])
def test_what_is_no_path_is_no_component(path):
    with pytest.raises(ComponentError, match="no component"):
        Decoder.of(tiny.model_of("llama")).component(path)


def test_a_model_without_a_list_of_layers_is_refused():
    with pytest.raises(ModelError, match="Linear has no list of decoder layers"):
        Decoder.of(nn.Linear(2, 2))


def test_a_weight_that_two_components_hold_is_refused(family):
    model = tiny.model_of(family)
    paths = dtm.components(model)
    one, other = paths[1], paths[1 + len(paths) // tiny.LAYERS]
    model.get_submodule(other).weight = model.get_submodule(one).weight
    with pytest.raises(ModelError) as error:
        Decoder.of(model)
    assert str(error.value) == (
        f"{type(model).__name__}: {one} and {other} share one weight, so that neither can be treated alone"
    )


def test_an_embedding_may_be_the_head_too():
    model = tiny.model_of("llama", tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert len(Decoder.of(model).components) == tiny.LAYERS * len(GATED)


def test_layers_without_matrices_are_refused():
    model = nn.Module()
    model.layers = nn.ModuleList([nn.LayerNorm(4)])
    with pytest.raises(ModelError, match=r"layers of Module \(layers\) hold no weight matrix"):
        Decoder.of(model)


def test_a_weight_that_is_computed_from_others_is_said(llama):
    up = llama.model.layers[1].mlp.up_proj
    torch.nn.utils.parametrizations.weight_norm(up)
    component = Decoder.of(llama).component("model.layers.1.mlp.up_proj")
    with pytest.raises(
        ComponentError, match=r"^model.layers.1.mlp.up_proj: its weight is computed from other"
    ):
        _ = component.weight
