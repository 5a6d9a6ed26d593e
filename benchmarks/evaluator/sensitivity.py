"""The field's shortcut: one forward and one backward pass, and every component's harm is predicted."""

import time
from collections.abc import Mapping

import torch

from dtm_fast.compression import Treatment
from dtm_fast.measure import Probes
from dtm_fast.model import Decoder


def gradient_sensitivity(
    decoder: Decoder, probes: Probes, treatment: Treatment
) -> tuple[dict[str, float], float]:
    """Predicted harm of each component alone, and the seconds of the passes (compression not counted).

    sum over probes and weights of (gradient * change)², the gradient being that of the likelihood of the base's own
    completions: the diagonal of the empirical Fisher matrix, as in ModelOpt's gradient scores and SqueezeLLM.
    """
    model, n = decoder.model, probes.prefix
    changes = {
        path: treatment.compress(c.weight).float() - c.weight.float()
        for path, c in decoder.components.items()
    }
    harm = dict.fromkeys(decoder.components, 0.0)
    weights = [c.parameter for c in decoder.components.values()]
    for weight in weights:
        weight.requires_grad_(True)
    started = time.perf_counter()
    for row in probes.tokens:
        hidden = model.base_model(row[None], use_cache=False).last_hidden_state[0, n - 1 : -1]
        loss = torch.nn.functional.cross_entropy(
            model.get_output_embeddings()(hidden).float(), row[n:], reduction="sum"
        )
        for (path, component), gradient in zip(
            decoder.components.items(), torch.autograd.grad(loss, weights), strict=True
        ):
            own = gradient.t() if component.transposed else gradient
            harm[path] += float((own.float() * changes[path]).square().sum())
    seconds = time.perf_counter() - started
    for weight in weights:
        weight.requires_grad_(False)
    return harm, seconds


def rank_correlation(predicted: Mapping[str, float], measured: Mapping[str, float]) -> float:
    """Spearman's, of predicted harm with measured FDT turned round: 1 where both order the components alike."""
    paths = sorted(predicted)
    ranks = [
        _ranks(torch.tensor([values[path] for path in paths], dtype=torch.float64))
        for values in (predicted, {path: -measured[path] for path in paths})
    ]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def _ranks(values: torch.Tensor) -> torch.Tensor:
    """Ranks, the mean of theirs for equal values."""
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    return (ends - (counts.double() - 1) / 2)[inverse]
