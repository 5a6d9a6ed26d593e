"""A model as its config.json describes it, without weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from dtm_fast.errors import ModelError
from dtm_fast.model.soundness import check_causal, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def read_skeleton(folder: Path) -> tuple[PreTrainedConfig, PreTrainedModel]:
    """The configuration in a folder, and its model on the meta device.

    Raises:
        ModelError: there is no config.json, or none of a causal language model.
    """
    if not os.path.isfile(folder / "config.json"):  # is_file raises where a folder may not be looked into
        raise ModelError(
            f"{folder}: the folder has no config.json that can be read, so it is no Hugging Face model"
        )
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise ModelError(f"{folder}: no usable model configuration: {first_line(error)}") from error
    check_causal(folder, config)
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:
        raise ModelError(f"{folder}: no model of its config.json can be made: {first_line(error)}") from error
    return config, model


def linear_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Path → (N, K) of every ``torch.nn.Linear``: what compressed-tensors and vLLM can hold quantized."""
    return {
        path: (module.out_features, module.in_features)
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
