from types import SimpleNamespace

import pytest
import tiny
import torch
import transformers

from dtm_fast.errors import MeasurementError, ModelError
from dtm_fast.measure.completion import greedy, teacher_forced_greedy

pytestmark = pytest.mark.once


def prefixes_of(rows: int, length: int, vocabulary: int = 99) -> torch.Tensor:
    return torch.randint(3, vocabulary, (rows, length), generator=torch.Generator().manual_seed(0))


def plain_greedy(model, tokens: torch.Tensor, length: int) -> torch.Tensor:
    """One whole pass a token, without a cache."""
    while tokens.shape[1] < length:
        tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], dim=1)
    return tokens


@torch.no_grad()
def test_greedy_is_a_pass_a_token(family):
    model, prefixes = tiny.model_of(family), prefixes_of(3, 6)
    assert torch.equal(greedy(model, prefixes, 20), plain_greedy(model, prefixes, 20))


def test_greedy_ends_at_no_end_of_text(llama):
    prefixes = prefixes_of(2, 4)
    written = greedy(llama, prefixes, 30)
    llama.generation_config.eos_token_id = int(written[0, 5])
    llama.config.eos_token_id = int(written[0, 5])
    assert torch.equal(greedy(llama, prefixes, 30), written)


@torch.no_grad()
def test_what_the_teacher_forced_pass_confirms_needs_no_correction(family):
    model, prefixes = tiny.model_of(family), prefixes_of(3, 6)
    tokens, corrected = teacher_forced_greedy(model, prefixes, 14)
    assert corrected == 0
    assert torch.equal(tokens, plain_greedy(model, prefixes, 20))


def test_a_completion_may_be_one_token_and_a_prefix_too(llama):
    tokens, _ = teacher_forced_greedy(llama, prefixes_of(2, 1), 1)
    assert tokens.shape == (2, 2)


class TwoMinds:
    """A model whose decoding with a cache chooses otherwise than its pass over the whole text.

    After token t the pass chooses t + 1; with a cache, t + 2 where t is a multiple of ``lapse``.
    """

    device = torch.device("cpu")

    def __init__(self, lapse: int) -> None:
        self.lapse = lapse

    def __call__(self, input_ids, use_cache, logits_to_keep, past_key_values=None):
        ids = input_ids[:, -logits_to_keep:]
        wrong = (ids % self.lapse == 0) & use_cache
        following = (ids + 1 + wrong.long()) % 1000
        return SimpleNamespace(
            logits=torch.nn.functional.one_hot(following, 1000).float(), past_key_values="cache"
        )


def test_where_the_whole_pass_chooses_otherwise_its_choice_counts():
    tokens, corrected = teacher_forced_greedy(TwoMinds(7), torch.tensor([[1, 2], [30, 40], [6, 7]]), 20)
    expected = [[1, *range(2, 23)], [30, *range(40, 61)], [6, *range(7, 28)]]
    assert tokens.tolist() == expected
    # Multiples of 7 that a next token follows: 7, 14, 21; 42, 49, 56; 7, 14, 21.
    assert corrected == 9


def test_a_lapse_at_the_last_token_is_corrected_too():
    tokens, corrected = teacher_forced_greedy(TwoMinds(7), torch.tensor([[5, 6]]), 2)
    assert (tokens.tolist(), corrected) == ([[5, 6, 7, 8]], 1)


def test_every_token_may_be_corrected():
    tokens, corrected = teacher_forced_greedy(TwoMinds(1), torch.tensor([[0]]), 12)
    assert (tokens.tolist(), corrected) == ([list(range(13))], 12)


def test_a_model_that_never_settles_is_an_error():
    def dice(input_ids, logits_to_keep, **_):
        shape = (*input_ids[:, -logits_to_keep:].shape, 50)
        return SimpleNamespace(logits=torch.rand(shape), past_key_values="cache")

    dice.device = torch.device("cpu")
    with pytest.raises(MeasurementError, match="chooses other tokens each time it reads the same text"):
        teacher_forced_greedy(dice, torch.zeros(2, 3, dtype=torch.int64), 6)


SMALL = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 3}
RECURRENT = {
    "Mamba": transformers.MambaConfig(**SMALL, state_size=4),
    "Rwkv": transformers.RwkvConfig(**SMALL, attention_hidden_size=32, intermediate_size=64),
    "RecurrentGemma": transformers.RecurrentGemmaConfig(
        **SMALL, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64, lru_width=32
    ),
}


@pytest.mark.parametrize("name", RECURRENT)
def test_a_model_without_a_key_value_cache_is_refused(name):
    model = transformers.AutoModelForCausalLM.from_config(RECURRENT[name]).eval()
    with pytest.raises(ModelError) as error:
        teacher_forced_greedy(model, prefixes_of(2, 4), 3)
    assert str(error.value) == f"{name}ForCausalLM has no key-value cache, which writing a completion needs"


def test_a_model_that_returns_none_for_its_cache_is_refused():
    def forgetful(input_ids, logits_to_keep, **_):
        shape = (*input_ids[:, -logits_to_keep:].shape, 50)
        return SimpleNamespace(logits=torch.zeros(shape), past_key_values=None)

    forgetful.device = torch.device("cpu")
    with pytest.raises(ModelError, match="has no key-value cache"):
        teacher_forced_greedy(forgetful, prefixes_of(2, 4, 50), 3)


@pytest.mark.model
def test_smollm2_writes_what_generate_writes(smollm2):
    model, tokenizer = smollm2
    texts = ["The capital of France is", "def fibonacci(n):\n   ", "Once upon a time, a fox and"]
    ids = torch.tensor([tokenizer(text).input_ids[:5] for text in texts])
    generated = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=16, eos_token_id=None
    )
    tokens, _ = teacher_forced_greedy(model, ids, 16)
    assert torch.equal(tokens, generated)
