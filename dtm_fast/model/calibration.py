"""A calibration: what the inputs of every component are like while the model reads some text."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dtm_fast.cache import cache_folder
from dtm_fast.errors import InputError
from dtm_fast.model.decoder import Decoder
from dtm_fast.model.identity import model_identity
from dtm_fast.model.input_collection import collected
from dtm_fast.model.input_statistics import InputStatistics
from dtm_fast.model.soundness import check_eval_mode, check_vocabulary, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_FORMAT = 1  # raise when the meaning of what is cached changes


class Calibration:
    """The input statistics of all components of a model, in a file of the cache or in memory.

    Attributes:
        model: ``model_identity`` of the model that was calibrated.
        identity: SHA-256 of that and the tokens, the same wherever they are computed; 64 hexadecimal digits.
        inputs: component → its statistics; components that have the same input share them.
    """

    def __init__(self, model: str, identity: str, inputs: Mapping[str, InputStatistics]) -> None:
        """As ``collect`` and ``from_text`` make it."""
        self.model = model
        self.identity = identity
        self.inputs = inputs

    @classmethod
    def collect(
        cls, model: PreTrainedModel, tokens: Tensor, *, batch_size: int = 8, cache: bool = True
    ) -> Calibration:
        """Lets the model read ``tokens`` once and sums what enters each component.

        Statistics are kept in the cache folder, by model and tokens, and taken from there the next time, whatever the
        batch size and the device: these change their last digits only. Until they are written, the sums of all
        components are in memory, 8 bytes for each of K² of every input that is not shared; 0.8 GB for SmolLM2-135M.

        Args:
            model: the base, a causal language model in eval mode, on any device.
            tokens: int64 [S, T], sequences of the same length without padding.
            batch_size: rows in one forward pass.
            cache: whether to look into the cache and write to it; a cache that cannot be written is only a warning.

        Raises:
            InputError: tokens are none, of another dtype, not of this model's vocabulary or beyond its context.
            ModelError: the model is in train mode, its layers are not found, or components share an input in some calls
                only.
            MeasurementError: a component's input is NaN or infinite.
        """
        decoder = Decoder.of(model)
        check_eval_mode(model)
        _check_tokens(model, tokens)
        _check_whole("batch_size", batch_size)
        of_model = model_identity(model)
        identity = _identity(of_model, tokens)
        file = cache_folder() / "calibrations" / f"{identity}.safetensors"
        inputs = _load(file, identity) if cache else None
        if inputs is None:
            sums, owners = collected(decoder, tokens, batch_size)
            counts = {owner: each.count for owner, each in sums.items()}
            tensors: dict[str, Tensor] = {}
            for owner in counts:
                each = sums.pop(owner)  # its float64 is not needed any more
                tensors[f"{owner}.squared_norm"] = each.squared_norm.float()
                tensors[f"{owner}.gram"] = each.gram.float()
            if cache and _save(tensors, counts, owners, file):
                inputs = _load(file, identity)
            if inputs is None:
                inputs = _statistics(counts, owners, identity, tensors.__getitem__)
        return cls(of_model, identity, inputs)

    @classmethod
    def from_text(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        documents: str | Sequence[str],
        count: int = 64,
        length: int | None = None,
        *,
        batch_size: int = 8,
        cache: bool = True,
    ) -> Calibration:
        """``collect`` of tokens made from text.

        Each document is tokenized as the tokenizer frames a text; the row of all is cut into sequences, and ``count``
        of them are taken evenly; where there are fewer, all, with a warning. Wanda, SparseGPT and GPTQ use 128
        sequences of 2,048 tokens, which take eight times as long as the default.

        Args:
            model: as of ``collect``.
            tokenizer: its tokenizer.
            documents: one or several.
            count: the most sequences to take, at least 1.
            length: tokens of each, at least 1; by default 512, or the model's context where that is shorter.
            batch_size: as of ``collect``.
            cache: as of ``collect``.

        Raises:
            InputError: a number is out of its range, or the text is shorter than one sequence.
            ModelError: the tokenizer is of another vocabulary; as of ``collect``.
            MeasurementError: as of ``collect``.
        """
        context = _context(model)
        if length is None:
            length = 512 if context is None else min(512, context)
        _check_whole("count", count)
        _check_whole("length", length)
        check_vocabulary(model, tokenizer)
        texts = [documents] if isinstance(documents, str) else documents
        tokens = _sequences(tokenizer, texts, length, count)
        return cls.collect(model, tokens, batch_size=batch_size, cache=cache)


def _sequences(
    tokenizer: PreTrainedTokenizerBase, documents: Sequence[str], length: int, count: int
) -> Tensor:
    """At most ``count`` sequences, evenly from all of the text, int64 [S, length]."""
    ids = [token for each in documents for token in tokenizer(each, verbose=False).input_ids]
    found = len(ids) // length
    if not found:
        raise InputError(f"the calibration text has {len(ids)} tokens, one sequence {length}")
    if found < count:
        warnings.warn(
            f"the calibration text has {found} sequences of {length} tokens, not {count}", stacklevel=3
        )
    taken = torch.linspace(0, found - 1, min(count, found), dtype=torch.float64).round().long()
    return torch.tensor(ids[: found * length], dtype=torch.int64).view(found, length)[taken]


def _check_tokens(model: PreTrainedModel, tokens: Tensor) -> None:
    if not isinstance(tokens, Tensor) or tokens.dtype != torch.int64 or tokens.dim() != 2:
        what = f"{tokens.dtype} {list(tokens.shape)}" if isinstance(tokens, Tensor) else repr(type(tokens))
        raise InputError(f"calibration tokens: expected int64 [S, T], got {what}")
    if not tokens.numel():
        raise InputError(f"calibration tokens: there are none in {list(tokens.shape)}")
    embedding: Any = model.get_input_embeddings()
    rows, least, most = embedding.weight.shape[0], int(tokens.min()), int(tokens.max())
    if least < 0 or most >= rows:
        raise InputError(f"calibration tokens: ids go from {least} to {most}, the model embeds {rows}")
    context = _context(model)
    if context is not None and tokens.shape[1] > context:
        raise InputError(
            f"calibration tokens: {tokens.shape[1]} are beyond the model's context of {context} tokens"
        )


def _check_whole(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"calibration: {name} must be a whole number of at least 1, not {value!r}")


def _context(model: PreTrainedModel) -> int | None:
    found: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return found


def _identity(model: str, tokens: Tensor) -> str:
    digest = hashlib.sha256(f"calibration {_FORMAT} {model} {tuple(tokens.shape)};".encode())
    digest.update(tokens.cpu().contiguous().numpy().data)
    return digest.hexdigest()


def _statistics(
    counts: Mapping[str, int], owners: Mapping[str, str], identity: str, read: Callable[[str], Tensor]
) -> dict[str, InputStatistics]:
    """By component; ``read`` gives a tensor by its name in the file."""

    def of(owner: str) -> InputStatistics:
        width = len(read(f"{owner}.squared_norm"))
        return InputStatistics(
            f"{identity} {owner}", counts[owner], width, lambda name: read(f"{owner}.{name}")
        )

    of_owner = {owner: of(owner) for owner in counts}
    return {path: of_owner[owner] for path, owner in owners.items()}


def _save(
    tensors: Mapping[str, Tensor], counts: Mapping[str, int], owners: Mapping[str, str], file: Path
) -> bool:
    """Writes the file whole or not at all; a cache that cannot be written is only a warning."""
    unfinished = file.with_suffix(f".{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        described = {"counts": json.dumps(counts), "owners": json.dumps(owners)}
        checksum = _checksum(counts, owners, tensors.__getitem__)
        save_file(dict(tensors), unfinished, metadata=described | {"checksum": checksum})
        unfinished.replace(file)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            unfinished.unlink()
        warnings.warn(f"the calibration is not cached: {first_line(error)}", stacklevel=3)
        return False
    return True


def _checksum(counts: Mapping[str, int], owners: Mapping[str, str], read: Callable[[str], Tensor]) -> str:
    """``read`` gives a tensor by its name in the file."""
    digest = hashlib.sha256(json.dumps([counts, owners]).encode())
    for owner in counts:
        for name in ("squared_norm", "gram"):
            digest.update(read(f"{owner}.{name}").contiguous().numpy().data)
    return digest.hexdigest()


def _load(file: Path, identity: str) -> dict[str, InputStatistics] | None:
    """The statistics in ``file``, which stays open; None where there is no such file or it is damaged."""
    try:
        stored: Any = safe_open(file, framework="pt")
        described = stored.metadata()
        counts, owners = json.loads(described["counts"]), json.loads(described["owners"])
        # safetensors notices a file that is cut off, but no byte that is another.
        if described["checksum"] != _checksum(counts, owners, stored.get_tensor):
            return None
        return _statistics(counts, owners, identity, stored.get_tensor)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None
