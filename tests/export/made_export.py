"""A tiny model under a plan, as a folder that others load."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from dtm_fast import ops
from dtm_fast.compression import W8A8, Change, Configuration, Drop, Int4, Int8, Prune
from dtm_fast.model import Decoder, model_identity
from dtm_fast.plan import Plan

LAYER = "model.layers.{}."
ATTENTION = [LAYER + f"self_attn.{name}_proj" for name in "qkv"]
GATED = [LAYER + f"mlp.{name}_proj" for name in ("gate", "up")]

MIXED: Configuration = {
    **{path.format(0): W8A8() for path in ATTENTION},
    "model.layers.0.self_attn.o_proj": Prune(0.2),
    "model.layers.1.mlp.down_proj": Prune(0.55),
    **{path.format(1): Int8() for path in GATED},
    "model.layers.2.self_attn.v_proj": Int4(16),
    "model.layers.2.mlp.down_proj": W8A8(),
}
"""Whole sets of what vLLM fuses, and a component of every form."""

WITH_DROP: Configuration = {"model.layers.2.self_attn.o_proj": Drop(), "model.layers.0.mlp.up_proj": Int8()}


def plan_for(model: PreTrainedModel, configuration: Configuration) -> Plan:
    """A plan as a search would have found it."""
    return Plan(dict(configuration), "in order", {"every": 1}, model_identity(model))


def model_in(dtype: torch.dtype, **changes: object) -> PreTrainedModel:
    """A tiny Llama of random weights in a dtype, as it is after loading: casting one rounds its rotary frequencies."""
    model = tiny.model_of("llama", **changes)
    cast: PreTrainedModel = type(model).from_pretrained(
        None, config=model.config, state_dict=dict(model.state_dict()), dtype=dtype
    )
    return cast.eval()


@dataclass
class Exported:
    """A folder, of what it was made, and what was said of it."""

    folder: Path
    model: PreTrainedModel
    configuration: Configuration
    problems: list[str]

    @property
    def config(self) -> dict[str, Any]:
        return json.loads((self.folder / "config.json").read_text())

    def rewrite_config(self, change: Callable[[dict[str, Any]], object]) -> None:
        """``change`` gets the whole config."""
        config = self.config
        change(config)
        (self.folder / "config.json").write_text(json.dumps(config))

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        with safe_open(self.folder / "model.safetensors", "pt") as stored:
            return {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118

    def rewrite_tensors(self, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
        """``change`` gets all of them by name."""
        tensors = self.tensors
        change(tensors)
        save_file(tensors, self.folder / "model.safetensors", metadata={"format": "pt"})


@contextmanager
def arithmetic_of_transformers(model: PreTrainedModel, configuration: Configuration) -> Iterator[None]:
    """The model with the weights and inputs that transformers and compressed-tensors compute with."""
    decoder = Decoder.of(model)
    int8 = {path: decoder.component(path).weight.clone() for path in configuration}
    weights = {path: Int8() if isinstance(t, W8A8) else t for path, t in configuration.items()}
    with ExitStack() as undo, Change(decoder, weights):
        for path, treatment in configuration.items():
            component = decoder.component(path)
            if isinstance(treatment, Int8) and model.dtype != torch.float32:
                quantized, scale = ops.quantize_int8(int8[path])
                component.parameter.data = quantized.to(model.dtype) * scale[:, None].to(model.dtype)
            if isinstance(treatment, W8A8):
                hook = component.module.register_forward_pre_hook(
                    lambda _, x: (_input_of_transformers(x[0]),)
                )
                undo.callback(hook.remove)
        yield


def _input_of_transformers(x: torch.Tensor) -> torch.Tensor:
    """What compressed-tensors makes of an input per token, symmetric int8, in x's dtype throughout."""
    step = x.abs().amax(dim=-1, keepdim=True) / 127.5
    step = step.where(step > 0, torch.finfo(x.dtype).eps)
    return torch.round((x / step).clamp(-128, 127)) * step
