"""Short recovery trainings of a tiny Llama."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import plain_loop
import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from dtm_fast import Prune
from dtm_fast.compression.recovery import recover
from dtm_fast.compression.recovery_settings import Recovery
from dtm_fast.model import Decoder

SMALL = Recovery(
    masked_steps=5,
    unmasked_steps=3,
    batch=4,
    length=16,
    learning_rate=3e-3,
    micro_batch=4,
    checkpoint_every=2,
)
LONG = replace(SMALL, masked_steps=60, unmasked_steps=20)
UP = "model.layers.0.mlp.up_proj"
PRUNED = {
    UP: Prune(0.5),
    "model.layers.2.self_attn.q_proj": Prune(0.8),
    "model.layers.1.mlp.down_proj": Prune(0.3),
}


def random_tokens(sequences: int = 6, length: int = 16) -> torch.Tensor:
    return torch.randint(3, tiny.VOCABULARY, (sequences, length), generator=torch.Generator().manual_seed(3))


def half_of(model: PreTrainedModel) -> dict[str, Prune]:
    return dict.fromkeys(Decoder.of(model).components, Prune(0.5))


def dropped_by_sorting(weight: torch.Tensor, sparsity: float) -> torch.Tensor:
    return plain_loop.prune(weight.detach(), sparsity) == 0


def before_each_step(model: PreTrainedModel, action: Callable[[int], object]) -> None:
    """``action(step)`` where a batch is computed at once."""
    calls = iter(range(1000))
    model.register_forward_pre_hook(lambda *_: (action(next(calls)), None)[1])


def stop_at(model: PreTrainedModel, step: int) -> PreTrainedModel:
    def action(at: int) -> None:
        if at == step:
            raise KeyboardInterrupt

    before_each_step(model, action)
    return model


def interrupted(folder: Path, steps: int, settings: Recovery = SMALL) -> dict[str, torch.Tensor]:
    """The optimizer's state in the checkpoint that is there when that many steps are done."""
    model = stop_at(tiny.model_of("llama"), steps)
    with pytest.raises(KeyboardInterrupt):
        recover(model, PRUNED, random_tokens(4), settings, folder)
    return load_file(folder / f"checkpoint-{steps}" / "optimizer.safetensors")


def whole(folder: Path, settings: Recovery = SMALL) -> tuple[PreTrainedModel, list[float]]:
    model = tiny.model_of("llama")
    return model, recover(model, PRUNED, random_tokens(), settings, folder).losses
