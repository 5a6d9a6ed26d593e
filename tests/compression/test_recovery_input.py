import math
from dataclasses import replace

import pytest
import tiny
import torch
from recoveries import PRUNED, SMALL, UP, random_tokens
from transformers import PreTrainedModel

from dtm_fast import W8A8, Int8, Prune, accelerate
from dtm_fast.compression.recovery import recover
from dtm_fast.compression.recovery_settings import Recovery
from dtm_fast.errors import ComponentError, InputError, ModelError, TreatmentError

pytestmark = pytest.mark.once


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"masked_steps": -1}, "masked_steps must be a whole number of at least 0, not -1"),
        ({"unmasked_steps": 1.5}, "unmasked_steps must be a whole number of at least 0, not 1.5"),
        ({"masked_steps": 0, "unmasked_steps": 0}, "masked_steps and unmasked_steps are both 0"),
        ({"batch": 0}, "batch must be a whole number of at least 1, not 0"),
        ({"length": 1}, "length must be a whole number of at least 2, not 1"),
        ({"micro_batch": True}, "micro_batch must be a whole number of at least 1, not True"),
        ({"seed": "0"}, "seed must be a whole number of at least 0, not '0'"),
        ({"checkpoint_every": 0}, "checkpoint_every must be a whole number of at least 1, not 0"),
        ({"weight_decay": -0.1}, "weight_decay must be a finite number of at least 0, not -0.1"),
        ({"weight_decay": math.nan}, "weight_decay must be a finite number of at least 0, not nan"),
        ({"learning_rate": 0}, "learning_rate must be a finite number above 0 and at most 1, not 0"),
        ({"learning_rate": 1.5}, "learning_rate must be a finite number above 0 and at most 1, not 1.5"),
        (
            {"learning_rate": "1e-4"},
            "learning_rate must be a finite number above 0 and at most 1, not '1e-4'",
        ),
        ({"clip": 0.0}, "clip must be a finite number above 0, not 0.0"),
        ({"clip": math.inf}, "clip must be a finite number above 0, not inf"),
        ({"clip": True}, "clip must be a finite number above 0, not True"),
    ],
)
def test_a_bad_setting_is_said_in_one_line(bad, said):
    with pytest.raises(InputError) as error:
        Recovery(**bad)
    assert str(error.value) == f"Recovery: {said}"


def frozen() -> PreTrainedModel:
    return tiny.model_of("llama").requires_grad_(False)


def accelerated() -> PreTrainedModel:
    model = tiny.model_of("llama")
    accelerate(model, {"model.layers.0.mlp.up_proj": W8A8()})
    return model


def sampling() -> PreTrainedModel:
    """With what transformers loads, and refuses to save."""
    model = tiny.model_of("llama")
    model.generation_config.do_sample, model.generation_config.temperature = False, 0.7
    return model


@pytest.mark.parametrize(
    ("changed", "kind", "said"),
    [
        (
            {"tokens": random_tokens().int()},
            InputError,
            r"tokens: expected int64 \[S, 16\], got torch.int32 \[6, 16\]",
        ),
        (
            {"tokens": random_tokens(length=8)},
            InputError,
            r"tokens: expected int64 \[S, 16\], got torch.int64 \[6, 8\]",
        ),
        (
            {"tokens": random_tokens()[0]},
            InputError,
            r"tokens: expected int64 \[S, 16\], got torch.int64 \[16\]",
        ),
        ({"tokens": [[1] * 16]}, InputError, r"tokens: expected int64 \[S, 16\], got list"),
        ({"tokens": random_tokens(0)}, InputError, "tokens: no sequence"),
        ({"tokens": random_tokens() + 1}, InputError, "tokens: ids go from 6 to 101, the model embeds 101"),
        ({"tokens": random_tokens() - 6}, InputError, "tokens: ids go from -1 to 94, the model embeds 101"),
        (
            {"tokens": random_tokens(length=200), "settings": replace(SMALL, length=200)},
            InputError,
            "length 200 is beyond the model's context of 128 tokens",
        ),
        (
            {"model": tiny.model_of("llama").bfloat16()},
            ModelError,
            r"recovery trains float32, model\.\S+ is torch.bfloat16",
        ),
        ({"model": frozen()}, ModelError, "no weight of the model requires a gradient"),
        ({"model": accelerated()}, ModelError, "recovery: the model is accelerated: "),
        ({"model": sampling()}, ModelError, "the model's generation_config cannot be saved: .*temperature"),
        ({"configuration": {"lm_head": Prune(0.5)}}, ComponentError, "lm_head"),
        ({"configuration": {UP: Int8()}}, TreatmentError, f"{UP}: .* or dropped, not int8"),
        ({"configuration": {UP: Prune(0.5, "wanda")}}, TreatmentError, r"not prune\(0.5,wanda\)"),
        ({"configuration": {UP: Prune("2:5")}}, TreatmentError, f"{UP}: "),
        ({"configuration": [UP]}, TreatmentError, "a configuration maps components"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_done(changed, kind, said, tmp_path):
    given = {
        "model": tiny.model_of("llama"),
        "configuration": PRUNED,
        "tokens": random_tokens(),
        "settings": SMALL,
    }
    given |= changed
    before = {name: weight.clone() for name, weight in given["model"].state_dict().items()}
    with pytest.raises(kind, match=said) as error:
        recover(*given.values(), tmp_path / "r")
    assert len(str(error.value).splitlines()) == 1
    assert not (tmp_path / "r").exists()
    assert all(torch.equal(weight, before[name]) for name, weight in given["model"].state_dict().items())
