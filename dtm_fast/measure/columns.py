"""What is read off the logits of a pass, per probe."""

from collections.abc import Callable, Set

import torch
from torch import Tensor

from dtm_fast.measure.forward import choice, kl_divergence, lead, negative_log_likelihood

OF_THE_PREFIX = frozenset({"perplexity", "agreement"})
"""Metrics that need the logits of the prefix, too."""


def first_predicted(metrics: Set[str], prefix: int) -> int:
    """The index of the first token whose logits ``columns_of`` needs."""
    return 1 if metrics & OF_THE_PREFIX else prefix


def columns_of(
    logits: Tensor,
    tokens: Tensor,
    prefix: int,
    metrics: Set[str],
    base_logits: Callable[[], Tensor],
    prefix_choices: Tensor,
) -> dict[str, Tensor]:
    """The values of ``Measurement.of`` for b probes, on the CPU.

    Args:
        logits: [b, T - first, V], those that predict the tokens from ``first_predicted`` on.
        tokens: int64 [b, T], prefixes with their completions.
        prefix: n.
        metrics: names of ``EXTRA_METRICS``.
        base_logits: gives those of the base for the completion, [b, N, V]; called for ``"kl"`` only.
        prefix_choices: int64 [b, n - 1], the base's choices for the prefix.
    """
    n = prefix
    reference = tokens.to(logits.device)
    completion = reference[:, n:]
    ours = logits[:, n - first_predicted(metrics, n) :]
    mismatch = choice(ours) != completion
    first = mismatch.int().argmax(dim=1, keepdim=True)
    found = {"mismatch": mismatch, "first_lead": lead(ours, completion).gather(1, first)[:, 0]}
    if "dppl" in metrics:
        found["dppl"] = perplexity_of(negative_log_likelihood(ours, completion))
    if "kl" in metrics:
        found["kl"] = kl_divergence(base_logits(), ours).double().mean(dim=1)
    if "perplexity" in metrics:
        found["perplexity"] = perplexity_of(negative_log_likelihood(logits[:, : n - 1], reference[:, 1:n]))
    if "agreement" in metrics:
        agrees = choice(logits[:, : n - 1]).cpu() == prefix_choices
        found["agreement"] = agrees.double().mean(dim=1)
    return {name: column.cpu() for name, column in found.items()}


def perplexity_of(nll: Tensor) -> Tensor:
    """``exp(mean(nll))`` over the positions, in float64; [b]."""
    return nll.double().mean(dim=1).exp()


def joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The columns of all probes from those of the batches."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
