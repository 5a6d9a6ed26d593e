"""Probes: prefixes of a text, each with the base model's greedy completion and its margins."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dtm_fast.cache import cache_folder
from dtm_fast.errors import ProbeError
from dtm_fast.measure.completion import teacher_forced_greedy
from dtm_fast.measure.forward import choice, lead, logits_before
from dtm_fast.model import check_eval_mode, check_vocabulary, model_identity, tokenizer_identity

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_FORMAT = 2  # raise when the meaning of what is cached changes


@dataclass(frozen=True, eq=False)
class Probes:
    """A set of probes. Token ids and margins only, some bytes a token: logits are never kept.

    Attributes:
        tokens: int64 [P, n + N], each prefix with the base's greedy completion.
        prefix: n, tokens of each prefix.
        completion: N, tokens of each completion.
        margins: float32 [P, N], the base's top-1 minus top-2 logit where it wrote each completion token.
        prefix_choices: int64 [P, n - 1], the base's argmax for prefix tokens 1 … n - 1.
        corrected: completion tokens where decoding with a cache fell otherwise than the full pass (near-ties).
        batch_size: rows in one forward pass of the base; another shape may round otherwise.
    """

    tokens: Tensor
    prefix: int
    completion: int
    margins: Tensor
    prefix_choices: Tensor
    corrected: int
    batch_size: int

    def __len__(self) -> int:
        """Number of probes, P."""
        return self.tokens.shape[0]

    @property
    def identity(self) -> str:
        """SHA-256 of the tokens, lengths and batch size; 64 hexadecimal digits."""
        shape = f"{self.prefix} {self.completion} {tuple(self.tokens.shape)} {self.batch_size};"
        digest = hashlib.sha256(shape.encode())
        digest.update(self.tokens.contiguous().numpy().tobytes())
        return digest.hexdigest()

    @classmethod
    def from_text(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        text: str | Sequence[str],
        prefix: int = 100,
        completion: int = 100,
        count: int = 64,
        *,
        batch_size: int = 8,
        cache: bool = True,
        other_than: Probes | None = None,
    ) -> Probes:
        """Cuts ``text`` into prefixes and lets the base model complete them greedily.

        ``count`` prefixes are taken evenly from all that the text has; where it has fewer, all, with a
        warning. If the tokenizer starts a text with a special token, each prefix starts with it.

        Args:
            model: the base, a causal language model in eval mode.
            tokenizer: its tokenizer.
            text: one document or several; a prefix never spans two.
            prefix: n, tokens of each prefix, at least 1.
            completion: N, tokens the base adds, at least 1.
            count: the most probes to make.
            batch_size: rows in one forward pass.
            cache: keep the probes on disk and take them from there the next time, by model, tokenizer, prefixes,
                n, N and what may round otherwise: dtype, device type, batch size, attention implementation, threads,
                instruction set and torch's version.
            other_than: probes whose prefixes are left out, so that these may judge what those chose.

        Raises:
            ProbeError: if a length is not positive or beyond the model's context, the text is shorter than one
                prefix, or ``other_than`` has prefixes of another length or all that the text has.
            ModelError: if the model is in train mode or has no key-value cache, or the tokenizer is of another
                vocabulary.

        Source: Deiseroth et al. 2023 (papers.md §1.1, §1.3).
        """
        for name, value in (
            ("prefix", prefix),
            ("completion", completion),
            ("count", count),
            ("batch_size", batch_size),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ProbeError(f"{name} must be a whole number of at least 1, not {value!r}")
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if context is not None and prefix + completion > context:
            raise ProbeError(
                f"prefix + completion = {prefix} + {completion} is beyond the model's context of {context} tokens"
            )
        check_eval_mode(model)
        check_vocabulary(model, tokenizer)
        prefixes = _cut(tokenizer, [text] if isinstance(text, str) else text, prefix)
        if other_than is not None:
            prefixes = _without(prefixes, other_than)
        if len(prefixes) < count:
            warnings.warn(
                f"the text has {len(prefixes)} prefixes of {prefix} tokens, not {count}", stacklevel=2
            )
        taken = torch.linspace(0, len(prefixes) - 1, min(count, len(prefixes)), dtype=torch.float64)
        taken = taken.round().long()
        prefixes = prefixes[taken]
        file = _cache_file(model, tokenizer, prefixes, completion, batch_size) if cache else None
        if file is not None and (known := _load(file)) is not None:
            return known
        probes = cls._complete(model, prefixes, completion, batch_size)
        if file is not None:
            _save(probes, file)
        return probes

    @classmethod
    def _complete(cls, model: PreTrainedModel, prefixes: Tensor, completion: int, batch_size: int) -> Probes:
        n, corrected = prefixes.shape[1], 0
        tokens, margins, prefix_choices = [], [], []
        for batch in prefixes.split(batch_size):
            written, changed = teacher_forced_greedy(model, batch, completion)
            logits = logits_before(model, written, 1)
            tokens.append(written)
            margins.append(lead(logits[:, n - 1 :], written[:, n:].to(logits.device)).cpu())
            prefix_choices.append(choice(logits[:, : n - 1]).cpu())
            corrected += changed
        return cls(
            torch.cat(tokens),
            n,
            completion,
            torch.cat(margins),
            torch.cat(prefix_choices),
            corrected,
            batch_size,
        )


def _cut(tokenizer: PreTrainedTokenizerBase, documents: Sequence[str], n: int) -> Tensor:
    """All prefixes of n tokens that do not overlap, int64 [P, n]."""
    plain = tokenizer("a", add_special_tokens=False).input_ids
    special = tokenizer("a").input_ids
    # What stands before the text; some tokenizers also put a token behind it, which a prefix must not have.
    start: list[int] = next(
        (special[:i] for i in range(len(special)) if special[i : i + len(plain)] == plain), []
    )
    room = n - len(start)
    if room < 1:
        raise ProbeError(
            f"a prefix of {n} tokens has no room for text behind the {len(start)} starting tokens"
        )
    rows, total = [], 0
    for document in documents:
        ids = tokenizer(document, add_special_tokens=False, verbose=False).input_ids
        total += len(ids)
        rows += [start + ids[i : i + room] for i in range(0, len(ids) - room + 1, room)]
    if not rows:
        raise ProbeError(f"the text is shorter than one prefix: {total} tokens, a prefix has {n}")
    return torch.tensor(rows, dtype=torch.int64)


def _without(prefixes: Tensor, other: Probes) -> Tensor:
    """The rows that are no prefix of ``other``."""
    n = prefixes.shape[1]
    if other.prefix != n:
        raise ProbeError(f"other_than: its prefixes have {other.prefix} tokens, not {n}")
    taken = set(map(tuple, other.tokens[:, :n].tolist()))
    left = [place for place, row in enumerate(prefixes.tolist()) if tuple(row) not in taken]
    if not left:
        raise ProbeError(f"the text has no other prefixes of {n} tokens than the {len(taken)} of other_than")
    return prefixes[left]


def _cache_file(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prefixes: Tensor,
    completion: int,
    batch_size: int,
) -> Path:
    what = {
        "format": _FORMAT,
        "model": model_identity(model),
        "tokenizer": tokenizer_identity(tokenizer),
        "prefixes": hashlib.sha256(prefixes.numpy().tobytes()).hexdigest(),
        "n": prefixes.shape[1],
        "N": completion,
        "dtype": str(model.dtype),
        "device": model.device.type,
        "batch_size": batch_size,
        # With another of these the base may round otherwise, and not choose the tokens that the file holds.
        "attention": model.config.get_text_config()._attn_implementation,
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
    }
    return cache_folder() / "probes" / f"{hashlib.sha256(json.dumps(what).encode()).hexdigest()}.safetensors"


def _save(probes: Probes, file: Path) -> None:
    """Writes the file whole or not at all; a cache that cannot be written is only a warning."""
    unfinished = file.with_suffix(f".{os.getpid()}-{id(probes)}")
    numbers = {"prefix": probes.prefix, "completion": probes.completion}
    numbers |= {"corrected": probes.corrected, "batch_size": probes.batch_size}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(
            {
                "tokens": probes.tokens,
                "margins": probes.margins,
                "prefix_choices": probes.prefix_choices.contiguous(),
            },
            unfinished,
            metadata={name: str(value) for name, value in numbers.items()} | {"checksum": _checksum(probes)},
        )
        unfinished.replace(file)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            unfinished.unlink()
        warnings.warn(f"the probes are not cached: {error}", stacklevel=3)


def _checksum(probes: Probes) -> str:
    digest = hashlib.sha256(f"{probes.identity} {probes.corrected} {probes.batch_size};".encode())
    for tensor in (probes.margins, probes.prefix_choices):
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _load(file: Path) -> Probes | None:
    """The probes in ``file``; None where there is no such file or it is damaged."""
    try:
        with safe_open(file, framework="pt") as stored:
            numbers = stored.metadata()
            probes = Probes(
                tokens=stored.get_tensor("tokens"),
                prefix=int(numbers["prefix"]),
                completion=int(numbers["completion"]),
                margins=stored.get_tensor("margins"),
                prefix_choices=stored.get_tensor("prefix_choices"),
                corrected=int(numbers["corrected"]),
                batch_size=int(numbers["batch_size"]),
            )
            # safetensors notices a file that is cut off, but no byte that is another.
            return probes if numbers["checksum"] == _checksum(probes) else None
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None
