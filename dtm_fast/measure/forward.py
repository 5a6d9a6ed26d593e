"""One plain teacher-forced pass of a Hugging Face model, and what is read off its logits."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dtm_fast.errors import NotFiniteError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ROWS = 32  # positions whose logits, of the whole vocabulary and in float32, are held at a time


@torch.no_grad()
def logits_before(model: PreTrainedModel, tokens: Tensor, first: int) -> Tensor:
    """``model(tokens).logits[:, first - 1 : -1]``, the logits that predict ``tokens[:, first:]``.

    The head is not run on the positions before those.

    Args:
        model: causal language model in eval mode.
        tokens: int64 [b, L].
        first: index of the first predicted token, from 1 to L - 1.

    Returns:
        [b, L - first, V] in the model's dtype.

    Raises:
        NotFiniteError: if a logit is NaN or plus infinity.
    """
    kept = tokens.shape[1] - first + 1
    output = model(input_ids=tokens.to(model.device), use_cache=False, logits_to_keep=kept)
    logits: Tensor = output.logits[:, -kept:-1]  # some models do not know logits_to_keep
    # max() hands a NaN on, so the maximum is finite only if no logit is NaN or +inf.
    if not torch.isfinite(logits.amax(dim=-1)).all():
        raise NotFiniteError("the model's logits are not finite")
    return logits


def choice(logits: Tensor) -> Tensor:
    """``logits.argmax(-1)``, the lowest id where logits are equal; int64 [b, N]."""
    return logits.argmax(dim=-1)


def first_divergent(mismatch: Tensor) -> Tensor:
    """The first True of each row of bool [P, N], int64 [P]; N where there is none."""
    # argmax names the first of equals.
    return torch.where(mismatch.any(dim=1), mismatch.int().argmax(dim=1), mismatch.shape[1])


def lead(logits: Tensor, reference: Tensor) -> Tensor:
    """The reference token's logit minus the largest other logit, float32 [b, N].

    Positive where the reference is the only argmax, zero where it is tied, negative where it loses. For the
    base on its own completion this is the top-1/top-2 margin.

    Args:
        logits: [b, N, V], V at least 2.
        reference: int64 [b, N].
    """
    values, ids = logits.topk(2, dim=-1)
    other = torch.where(ids[..., 0] == reference, values[..., 1], values[..., 0])
    wanted = logits.gather(-1, reference.unsqueeze(-1)).squeeze(-1)
    return wanted.float() - other.float()


def negative_log_likelihood(logits: Tensor, reference: Tensor) -> Tensor:
    """``F.cross_entropy(logits, reference)`` per position, in nats, computed in float32; [b, N]."""

    def of_rows(logits: Tensor, reference: Tensor) -> Tensor:
        logits = logits.float()
        return logits.logsumexp(dim=1) - logits.gather(1, reference[:, None])[:, 0]

    return _few_at_a_time(of_rows, logits, reference)


def kl_divergence(base: Tensor, other: Tensor) -> Tensor:
    """KL(softmax(base) ‖ softmax(other)) per position, in nats, computed in float32; [b, N].

    A token of no probability under the base counts 0, whatever the other model gives it.

    Args:
        base: logits of the base model [b, N, V].
        other: logits of the compressed model [b, N, V].
    """

    def of_rows(base: Tensor, other: Tensor, masked: bool = False) -> Tensor:
        base, other = base.float(), other.float()
        partition = base.logsumexp(dim=1)
        probability, difference = (base - partition[:, None]).exp(), base - other
        if masked:
            difference = torch.where(probability > 0, difference, 0)
        expected: Tensor = torch.linalg.vecdot(probability, difference)
        return expected - (partition - other.logsumexp(dim=1))

    found = _few_at_a_time(of_rows, base, other)
    # Only a logit of minus infinity makes a term NaN; to look at every term takes three times as long.
    if bool(found.isnan().any()):
        found = _few_at_a_time(partial(of_rows, masked=True), base, other)
    return found


def _few_at_a_time(of_rows: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """``of_rows`` of the positions of ``tensors`` [b, N, ...]: what it makes of their logits stays in the cache."""
    rows = (tensor.flatten(0, 1).split(_ROWS) for tensor in tensors)
    return torch.cat([of_rows(*some) for some in zip(*rows, strict=True)]).view(tensors[0].shape[:2])
