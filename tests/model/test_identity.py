import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from dtm_fast.model import model_identity, tokenizer_identity


def test_equal_models_have_equal_identities(family):
    assert model_identity(tiny.model_of(family)) == model_identity(tiny.model_of(family))


def test_a_model_saved_and_loaded_is_the_same(family, tmp_path):
    model = tiny.model_of(family)
    model.save_pretrained(tmp_path)
    assert model_identity(AutoModelForCausalLM.from_pretrained(tmp_path)) == model_identity(model)


def test_one_bit_of_one_weight_makes_another_model(llama):
    before = model_identity(llama)
    llama.model.layers[1].mlp.up_proj.weight.data.view(torch.int32)[3, 5] ^= 1
    assert model_identity(llama) != before


def test_minus_zero_is_another_weight(llama):
    weight = llama.model.layers[0].mlp.up_proj.weight.data
    weight[0, 0] = 0.0
    before = model_identity(llama)
    weight[0, 0] = -0.0
    assert model_identity(llama) != before


def test_another_dtype_makes_another_model(llama):
    assert model_identity(tiny.model_of("llama").bfloat16()) != model_identity(llama)


@pytest.mark.parametrize(
    "change",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
        {"rms_norm_eps": 1e-3},
        {"num_attention_heads": 4, "attention_bias": False, "hidden_act": "gelu"},
    ],
)
def test_equal_weights_that_are_computed_with_otherwise_make_another_model(llama, change):
    other = tiny.model_of("llama", **change)
    assert all(torch.equal(a, b) for a, b in zip(llama.parameters(), other.parameters(), strict=True))
    assert model_identity(other) != model_identity(llama)


def test_a_tokenizer_is_known_by_its_vocabulary():
    known = tokenizer_identity(tiny.tokenizer_of_characters())
    assert tokenizer_identity(tiny.tokenizer_of_characters()) == known
    assert tokenizer_identity(tiny.tokenizer_of_characters(extra=1)) != known


def test_rotary_frequencies_that_were_rounded_make_another_model():
    once = tiny.model_of("llama").bfloat16().float()
    once.model.rotary_emb.inv_freq.copy_(tiny.model_of("llama").model.rotary_emb.inv_freq / 3)
    before = model_identity(once)
    twice = once.bfloat16().float()
    assert model_identity(twice) != before


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_a_pass_over_a_long_text_makes_no_other_model(kind):
    long = {"factor": 2.0, "rope_theta": 10000.0, "original_max_position_embeddings": 16}
    factors = {"long_factor": [2.0] * 4, "short_factor": [1.0] * 4} if kind == "longrope" else {}
    model = tiny.model_of(
        "llama", rope_parameters={"rope_type": kind, **long, **factors}, max_position_embeddings=16
    )
    before = model_identity(model)
    frequencies = model.model.rotary_emb.inv_freq.clone()
    with torch.no_grad():
        model(torch.arange(40)[None])
    assert not torch.equal(model.model.rotary_emb.inv_freq, frequencies)
    assert model_identity(model) == before
