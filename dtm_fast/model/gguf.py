"""A GGUF file as a Hugging Face folder, dequantized once and kept in the cache.

transformers parses a GGUF's metadata anew for the configuration, the weights and the tokenizer, some 15
seconds for a vocabulary of 49,152; the folder loads in one.
"""

import hashlib
import mmap
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from dtm_fast.cache import cache_folder
from dtm_fast.errors import ModelError
from dtm_fast.model.soundness import check_complete

_FORMAT = 1  # raise when what is written to the folder changes


def gguf_as_folder(file: Path) -> Path:
    """The folder with the float32 safetensors and tokenizer of ``file``; made if the cache lacks it.

    The folder's name holds the SHA-256 of the file's bytes, so a changed file is converted anew.

    Raises:
        InputError: there is no cache, or it cannot be written.
        Whatever transformers raises for a file it cannot read.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        digest = hashlib.sha256(content)
    folder = cache_folder() / "gguf" / f"{file.stem}-{digest.hexdigest()[:16]}-{_FORMAT}"
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(dir=folder.parent, prefix="unfinished-"))
    except OSError as error:
        raise ModelError(
            f"{file}: a GGUF is converted into the cache, which cannot be written ({error}): "
            "set DTM_FAST_CACHE to a folder that can"
        ) from error
    try:
        config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, config=config, dtype=torch.float32, output_loading_info=True
        )
        model, info = loaded
        check_complete(file, info)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        # The folder is a plain float32 checkpoint; what it was read from must not travel with it.
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.hf_quantizer = None
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was first, with the same bytes
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder
