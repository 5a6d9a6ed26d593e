import pytest
import tiny
import torch
from transformers import BertConfig, T5Config, ViTConfig

from dtm_fast.errors import ModelError
from dtm_fast.model import check_vocabulary
from dtm_fast.model.soundness import check_causal, check_complete, check_finite, first_line


def test_every_decoder_family_is_causal(family):
    check_causal("it", tiny.model_of(family).config)
    check_causal("it", tiny.CONFIGURATIONS[family])  # its architectures are not filled in


@pytest.mark.parametrize("config", [BertConfig(architectures=["BertModel"]), T5Config(), ViTConfig()])
def test_other_models_are_not(config):
    with pytest.raises(ModelError, match=r"^it: not a causal language model: (BertModel|t5|vit)$"):
        check_causal("it", config)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_value_that_is_not_finite_is_counted(llama, value, dtype):
    llama.to(dtype).model.layers[2].mlp.up_proj.weight.data[1, :2] = value
    with pytest.raises(
        ModelError, match=r"model\.layers\.2\.mlp\.up_proj\.weight holds 2 values that are NaN"
    ):
        check_finite("it", llama)


def test_large_finite_weights_are_finite_though_their_sum_is_not(llama):
    llama.model.layers[0].mlp.up_proj.weight.data.fill_(3e38)
    check_finite("it", llama)


@pytest.mark.parametrize("problem", ["missing_keys", "mismatched_keys"])
def test_an_incomplete_checkpoint_is_named_with_its_first_key(problem):
    with pytest.raises(ModelError, match=r"2 (missing|mismatched) keys in the weights, first: a"):
        check_complete("it", {problem: {"b", "a"}})


def test_a_tokenizer_may_have_fewer_ids_than_the_model_embeds(llama):
    check_vocabulary(llama, tiny.tokenizer_of_characters(extra=2))  # 99 + 2 = 101


def test_a_tokenizer_with_more_is_of_another_vocabulary(llama):
    with pytest.raises(ModelError, match="another vocabulary: its ids go to 101, the model embeds 101"):
        check_vocabulary(llama, tiny.tokenizer_of_characters(extra=3))


def test_first_line_falls_back_to_the_exceptions_type():
    assert first_line(OSError("\n  one\ntwo")) == "one"
    assert first_line(KeyError()) == "KeyError"
