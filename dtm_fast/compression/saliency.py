"""How much each weight of a matrix matters, and the mask that keeps those that matter most."""

import torch
from torch import Tensor


def magnitude(weight: Tensor) -> Tensor:
    """``weight.abs()`` in float32; the saliency of Deiseroth et al. 2023 (papers.md §1.5).

    Args:
        weight: floating point, any shape.
    """
    return weight.detach().float().abs()


SALIENCIES = {"magnitude": magnitude}


def keep_mask(saliency: Tensor, sparsity: float) -> Tensor:
    """The bool mask that drops the ``round(sparsity * numel)`` least salient weights of the whole matrix.

    Masks of rising sparsity are nested: of equal saliencies the one that stands first goes first.

    Args:
        saliency: float32 [N, K], not NaN.
        sparsity: share of weights to drop, in [0, 1].

    Returns:
        bool [N, K], True where the weight is kept.
    """
    dropped = round(sparsity * saliency.numel())
    flat = saliency.flatten()
    if dropped == 0:
        return torch.ones_like(saliency, dtype=torch.bool)
    threshold = _smallest(flat, dropped)
    keep = flat > threshold
    tied = (flat == threshold).nonzero().squeeze(1)
    surplus = dropped - int((flat < threshold).sum())
    keep[tied[surplus:]] = True
    return keep.view_as(saliency)


def _smallest(flat: Tensor, count: int) -> Tensor:
    """The value that stands in place ``count``, from 1, when sorted."""
    # On a GPU one block of threads searches a vector's k-th value, and all of them sort it.
    if flat.device.type == "cuda":
        return flat.sort().values[count - 1]
    return flat.kthvalue(count).values
