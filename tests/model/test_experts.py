import pytest
from transformers import AutoModelForCausalLM, MixtralConfig

from dtm_fast.model import Decoder


def test_experts_that_are_no_components_are_named_in_a_warning():
    config = MixtralConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=2,
        vocab_size=101,
        max_position_embeddings=64,
    )
    with pytest.warns(
        UserWarning, match="MixtralForCausalLM: .* are no components, first: model.layers.0.mlp.experts"
    ):
        Decoder.of(AutoModelForCausalLM.from_config(config))
