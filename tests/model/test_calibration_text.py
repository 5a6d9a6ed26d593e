"""The text of a calibration: which sequences it is cut into, and which of them are taken."""

import warnings

import pytest
import tiny
import torch
from torch import Tensor
from transformers import PreTrainedModel

from dtm_fast.errors import InputError, ModelError
from dtm_fast.model import Calibration

UP = "model.layers.1.mlp.up_proj"


def sequences_of(llama: PreTrainedModel, documents: str | list[str], *args: int, **options: object) -> str:
    return Calibration.from_text(llama, tiny.tokenizer_of_characters(), documents, *args, **options).identity


def test_text_is_cut_into_sequences_of_which_some_are_taken_evenly(llama, fresh_cache):
    ids = torch.tensor(tiny.tokenizer_of_characters()("abcdefghijklmnopqrstuvw").input_ids)
    rows = ids[:20].view(5, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sequences_of(llama, ["abcdefg", "hijklmnopqrstuvw"], 5, 4) == self_identity(llama, rows)
        assert sequences_of(llama, "abcdefghijklmnopqrstuvw", 3, 4) == self_identity(llama, rows[[0, 2, 4]])
        assert sequences_of(llama, "abcdefghijklmnopqrstuvw", 1, 4) == self_identity(llama, rows[[0]])


def self_identity(llama: PreTrainedModel, tokens: Tensor) -> str:
    return Calibration.collect(llama, tokens).identity


def test_documents_are_framed_as_the_tokenizer_frames_a_text(llama, fresh_cache):
    tokenizer = tiny.tokenizer_of_characters(start=True)
    found = Calibration.from_text(llama, tokenizer, ["abc", "defg"], 3, 3)
    a = tokenizer.convert_tokens_to_ids("a")
    tokens = torch.tensor([[1, a, a + 1], [a + 2, 1, a + 3], [a + 4, a + 5, a + 6]])
    assert found.identity == self_identity(llama, tokens)


def test_fewer_sequences_than_wanted_are_a_warning(llama, fresh_cache):
    with pytest.warns(UserWarning, match="the calibration text has 5 sequences of 4 tokens, not 64"):
        sequences_of(llama, "abcdefghijklmnopqrstuvw", length=4)


def test_the_usual_length_is_at_most_the_models_context(llama, fresh_cache):
    text = tiny.text_of(tiny.CONTEXT * 64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = Calibration.from_text(llama, tiny.tokenizer_of_characters(), text)
    assert found.inputs[UP].count == 64 * tiny.CONTEXT


@pytest.mark.parametrize(
    ("arguments", "options", "said"),
    [
        (("abc", 1, 4), {}, "the calibration text has 3 tokens, one sequence 4"),
        (([], 1, 4), {}, "the calibration text has 0 tokens, one sequence 4"),
        (("abc", 0, 1), {}, "calibration: count must be a whole number of at least 1, not 0"),
        (("abc", 1, 0), {}, "calibration: length must be a whole number of at least 1, not 0"),
        (("abc", 1.0, 1), {}, "calibration: count must be a whole number of at least 1, not 1.0"),
        (
            ("abc", 1, 1),
            {"batch_size": 0},
            "calibration: batch_size must be a whole number of at least 1, not 0",
        ),
        (
            ("a" * 200, 1, 129),
            {},
            "calibration tokens: 129 are beyond the model's context of 128 tokens",
        ),
    ],
)
def test_text_that_gives_no_calibration_is_said_in_one_line(llama, fresh_cache, arguments, options, said):
    with pytest.raises(InputError) as error:
        sequences_of(llama, *arguments, **options)
    assert str(error.value) == said
    assert not fresh_cache.exists()


def test_another_vocabulary_is_refused(llama, fresh_cache):
    with pytest.raises(ModelError, match="another vocabulary"):
        Calibration.from_text(llama, tiny.tokenizer_of_characters(extra=9), "abcdef", 1, 4)
