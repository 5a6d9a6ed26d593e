"""How much each weight of a matrix matters, and the mask that keeps those that matter most."""

from collections.abc import Callable

import torch
from torch import Tensor

from dtm_fast.model import InputStatistics


def magnitude(weight: Tensor) -> Tensor:
    """``weight.abs()`` in float32; the saliency of Deiseroth et al. 2023 (papers.md §1.5).

    Args:
        weight: floating point, any shape.
    """
    return weight.detach().float().abs()


def wanda(weight: Tensor, inputs: InputStatistics) -> Tensor:
    """``weight.abs() * X.norm(dim=0)`` in float32, X [tokens, K] being the inputs.

    Args:
        weight: floating point, [N, K].
        inputs: of K channels.

    Source: Sun et al. 2023, "A Simple and Effective Pruning Approach for Large Language Models" (papers.md §5).
    """
    return magnitude(weight) * inputs.squared_norm.to(weight.device).sqrt()


SALIENCIES: dict[str, Callable[..., Tensor]] = {"magnitude": magnitude, "wanda": wanda}
"""By name; those in ``OF_INPUTS`` take a weight and its inputs, the others a weight."""

OF_INPUTS = frozenset({"wanda"})


def keep_mask(saliency: Tensor, sparsity: float) -> Tensor:
    """The bool mask that drops the ``round(sparsity * numel)`` least salient weights of the whole matrix.

    Masks of rising sparsity are nested: of equal saliencies the one that stands first goes first.

    Args:
        saliency: floating point [N, K], not NaN.
        sparsity: share of weights to drop, in [0, 1].

    Returns:
        bool [N, K], True where the weight is kept.
    """
    return keep_in_rows(saliency.reshape(1, -1), round(sparsity * saliency.numel())).view(saliency.shape)


def keep_in_rows(saliency: Tensor, dropped: int) -> Tensor:
    """The bool mask that drops the ``dropped`` least salient of each row; nested and ordered as ``keep_mask``.

    Args:
        saliency: floating point [R, L], not NaN.
        dropped: from 0 to L.

    Returns:
        bool [R, L].
    """
    if dropped == 0:
        return torch.ones_like(saliency, dtype=torch.bool)
    threshold = _smallest(saliency, dropped)
    keep = saliency > threshold
    tied = saliency == threshold
    surplus = dropped - (saliency < threshold).sum(dim=1)
    row, column = tied.nonzero(as_tuple=True)
    count = tied.sum(dim=1)
    place_among_tied = torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[row]
    stays = place_among_tied >= surplus[row]
    keep[row[stays], column[stays]] = True
    return keep


def _smallest(rows: Tensor, count: int) -> Tensor:
    """The value of each row that stands in place ``count``, from 1, when sorted; [R, 1]."""
    # On a GPU one block of threads searches a row's k-th value, and all of them sort it.
    if rows.device.type == "cuda":
        return rows.sort(dim=1).values[:, count - 1 : count]
    return rows.kthvalue(count, dim=1, keepdim=True).values
