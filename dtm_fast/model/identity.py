"""What makes two models, or two tokenizers, the same for a cache or a journal."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Container
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What a configuration says that does not change what the model computes.
_NOT_COMPUTED_WITH = {
    "_name_or_path",
    "architectures",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "pad_token_id",
    "transformers_version",
    "use_cache",
}


def model_identity(model: nn.Module) -> str:
    """SHA-256 over the configuration and every parameter and buffer: name, dtype, shape and bytes.

    The configuration counts because the same weights with another number of heads write another text; so does what a
    layer of ours ``computes_with`` beside its weights. Buffers that no checkpoint holds count, too: rotary frequencies
    that have once been cast to bfloat16 stay rounded. 64 hexadecimal digits.
    """
    from transformers import PretrainedConfig

    digest = hashlib.sha256(type(model).__name__.encode())
    config = getattr(model, "config", None)
    if isinstance(config, PretrainedConfig):
        said = {k: v for k, v in config.to_diff_dict().items() if k not in _NOT_COMPUTED_WITH}
        digest.update(json.dumps(said, sort_keys=True, default=str).encode())
    with torch.no_grad():
        stored = model.state_dict()
        for name, tensor in {**stored, **_others(model, stored)}.items():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    for path, module in model.named_modules():
        if isinstance(computes_with := getattr(module, "computes_with", None), str):
            digest.update(f"{path} {computes_with};".encode())
    return digest.hexdigest()


def _others(model: nn.Module, stored: Container[str]) -> dict[str, torch.Tensor]:
    """Buffers that are not ``stored``, but for rotary frequencies that every pass writes anew for its length."""
    found = {}
    for path, module in model.named_modules():
        kinds = str(getattr(module, "rope_type", ""))  # one, or one for each kind of layer
        rewrites = "dynamic" in kinds or "longrope" in kinds
        for name, buffer in module.named_buffers(prefix=path, recurse=False):
            rewritten = rewrites and name.endswith("inv_freq") and not name.endswith("original_inv_freq")
            if name not in stored and not rewritten:
                found[name] = buffer
    return found


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 over the vocabulary, each token with its id; 64 hexadecimal digits."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()
