"""The base model's greedy completion of a batch of prefixes, the same text its teacher-forced pass chooses."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from dtm_fast.errors import MeasurementError, ModelError
from dtm_fast.measure.forward import choice, logits_before

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def greedy(model: PreTrainedModel, tokens: Tensor, length: int) -> Tensor:
    """``tokens`` [b, n] continued to ``length`` tokens by argmax with a key-value cache; int64 [b, length].

    Ends at no end-of-text token: the metrics compare completions of one length.
    """
    b, n = tokens.shape
    return _written_behind(model, F.pad(tokens, (0, length - n)), torch.full((b,), n))


@torch.no_grad()
def _written_behind(model: PreTrainedModel, tokens: Tensor, agreed: Tensor) -> Tensor:
    """``tokens`` [b, L] with what stands behind the first ``agreed`` [b] tokens of each row written anew.

    All rows at once, from the end of the shortest on: a step costs about as much for all as for one, for it reads every
    weight once.
    """
    tokens, begin = tokens.clone(), int(agreed.min())
    cache, step = None, tokens[:, :begin]
    for position in range(begin, tokens.shape[1]):
        output = model(
            input_ids=step.to(model.device), past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        cache = getattr(output, "past_key_values", None)
        if cache is None:
            raise ModelError(
                f"{type(model).__name__} has no key-value cache, which writing a completion needs"
            )
        chosen = choice(output.logits[:, -1:]).to(tokens.device)
        step = torch.where((agreed > position)[:, None], tokens[:, position : position + 1], chosen)
        tokens[:, position : position + 1] = step
    return tokens


def teacher_forced_greedy(model: PreTrainedModel, prefixes: Tensor, completion: int) -> tuple[Tensor, int]:
    """The completion that the teacher-forced pass itself confirms token by token.

    Decoding one token at a time multiplies matrices of other shapes than one pass over the whole text, so
    near-ties can fall differently; then the base would diverge from its own text. So the cached decoder only
    proposes: where the full pass over this very batch chooses another token, that token is taken and the rest
    is decoded anew.

    Args:
        model: causal language model in eval mode.
        prefixes: int64 [b, n].
        completion: tokens to add.

    Returns:
        int64 [b, n + completion], and how many tokens the full pass corrected.

    Raises:
        ModelError: if the model has no key-value cache.
        MeasurementError: if the model's choices do not settle (its forward pass is not deterministic).
    """
    n = prefixes.shape[1]
    tokens, corrected = greedy(model, prefixes, n + completion), 0
    for _ in range(completion + 1):
        chosen = choice(logits_before(model, tokens, n)).to(tokens.device)
        differs = chosen != tokens[:, n:]
        if not differs.any():
            return tokens, corrected
        rows = differs.any(dim=1).nonzero().flatten()
        first = n + differs[rows].byte().argmax(dim=1)
        tokens[rows, first] = chosen[rows, first - n]
        tokens[rows] = _written_behind(model, tokens[rows], first + 1)
        corrected += len(rows)
    raise MeasurementError("the model chooses other tokens each time it reads the same text")
