"""Text as blocks of tokens, as language models are trained on it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dtm_fast.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def blocks_of(
    tokenizer: PreTrainedTokenizerBase, documents: str | Iterable[str], length: int, count: int, skip: int = 0
) -> Tensor:
    """The first ``count`` blocks of the documents' tokens, one document after the other.

    Each document is tokenized as the tokenizer frames a text, and ends with the token that ends a text where the
    tokenizer has one. Blocks are cut from the row of all of them, so that one may hold parts of several documents.
    Where the text has fewer blocks, all, with a warning. What is left at the end and fills no block is left out.

    Args:
        tokenizer: the model's.
        documents: one or several, read in this order and no further than needed; may be a stream.
        length: tokens in a block, at least 1.
        count: the most blocks to make, at least 1.
        skip: documents to leave out at the beginning: those that the probes are made from (``documents[:skip]``),
            so that the model is not trained on the text that it is measured on.

    Returns:
        int64 [S, length], S = count or fewer.

    Raises:
        InputError: a number is out of its range, or the text is shorter than one block.
    """
    for name, value, least in (("length", length, 1), ("count", count, 1), ("skip", skip, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise InputError(f"{name} must be a whole number of at least {least}, not {value!r}")
    end = tokenizer.eos_token_id
    texts: list[Tensor] = []
    total = 0
    for document in islice([documents] if isinstance(documents, str) else documents, skip, None):
        ids = tokenizer(document, verbose=False).input_ids
        if end is not None and ids[-1:] != [end]:
            ids.append(end)
        texts.append(torch.tensor(ids, dtype=torch.int64))
        total += len(ids)
        if total >= count * length:
            break
    found = min(count, total // length)
    if not found:
        after = f" after the first {skip} documents" if skip else ""
        raise InputError(f"the text{after} is shorter than one block: {total} tokens, a block has {length}")
    if found < count:
        warnings.warn(f"the text has {found} blocks of {length} tokens, not {count}", stacklevel=2)
    return torch.cat(texts)[: found * length].reshape(found, length)
