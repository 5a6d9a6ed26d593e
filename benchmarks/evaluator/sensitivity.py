"""How well predicted harm orders the components."""

from collections.abc import Mapping

import torch


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
