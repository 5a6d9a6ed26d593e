"""What a checkpoint must be before anything is measured on it; each check raises ModelError."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from dtm_fast.errors import ModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def check_causal(name: str | Path, config: PretrainedConfig) -> None:
    """The configuration is of a decoder-only language model that transformers itself implements."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    known = {
        architecture
        for entry in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
        for architecture in ([entry] if isinstance(entry, str) else entry)
    }
    architectures = config.architectures or []
    if not isinstance(architectures, list) or not all(isinstance(each, str) for each in architectures):
        raise ModelError(f"{name}: architectures: expected names, got {architectures!r}")
    causal = any(a in known for a in architectures) or (
        not architectures and config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    )
    if not causal or getattr(config, "is_encoder_decoder", False):
        what = ", ".join(architectures) or config.model_type
        raise ModelError(f"{name}: not a causal language model: {what}")


def check_safetensors(folder: Path) -> None:
    """The folder's weights are safetensors, and none of the files is truncated."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
        why = f"only {pickles[0]}, a pickle, which could run any code" if pickles else "no weights at all"
        raise ModelError(f"{folder}: weights are read from safetensors or GGUF; here is {why}")
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            if not os.access(file, os.R_OK):  # safetensors would say that it is not there
                raise ModelError(f"{file}: may not be read") from error
            raise ModelError(f"{file}: damaged or truncated: {first_line(error)}") from error


def check_complete(name: str | Path, info: dict[str, Any]) -> None:
    """The checkpoint held every weight (transformers initializes a missing one at random and goes on)."""
    for problem in ("missing_keys", "mismatched_keys"):
        if info.get(problem):
            keys = sorted(map(str, info[problem]))
            raise ModelError(
                f"{name}: {len(keys)} {problem.replace('_', ' ')} in the weights, first: {keys[0]}"
            )


def check_finite(name: str | Path, model: PreTrainedModel) -> None:
    """No weight is NaN or infinite."""
    for path, parameter in model.named_parameters():
        # A finite sum proves all values finite; an overflowing one proves nothing, so then look at each.
        if not torch.isfinite(parameter.sum(dtype=torch.float32)) and not torch.isfinite(parameter).all():
            count = int((~torch.isfinite(parameter)).sum())
            raise ModelError(f"{name}: {path} holds {count} values that are NaN or infinite")


def check_eval_mode(model: PreTrainedModel) -> None:
    """Raise ModelError if dropout would make the model compute another thing at each pass."""
    if model.training:
        raise ModelError("the model is in train mode, where dropout changes what it computes: model.eval()")


def check_vocabulary(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str | Path = "the model"
) -> None:
    """The tokenizer has no token id that the model does not embed."""
    embedding: Any = model.get_input_embeddings()
    rows = int(embedding.weight.shape[0])
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= rows:
        raise ModelError(
            f"{name}: the tokenizer is of another vocabulary: its ids go to {largest}, the model embeds {rows}"
        )


def check_storable(model: PreTrainedModel) -> None:
    """``model.save_pretrained`` would not refuse the model's generation config."""
    try:
        if model.can_generate() and model.generation_config is not None:
            model.generation_config.validate(strict=True)
    except ValueError as error:
        # The first line says that something is wrong, the second what.
        said = " ".join(str(error).split("\n")[:2])
        raise ModelError(f"the model's generation_config cannot be saved: {said}") from error


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its type where it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
