"""The Optimal Brain Surgeon as its paper has it: at each step the Hessian of what is left is inverted anew."""

from collections.abc import Callable

import torch
from torch import Tensor


def damped(gram: Tensor, damp: float) -> Tensor:
    """XᵀX in float64 with ``damp`` times its mean diagonal added; channels without any input aside."""
    hessian = gram.double().clone()
    living = hessian.diagonal() > 0
    mean = hessian.diagonal()[living].mean()
    hessian.diagonal().add_(damp * mean)
    hessian.diagonal()[~living] = 1.0
    return hessian


def remaining_inverse(hessian: Tensor, column: int) -> Tensor:
    """Of the columns from this one on."""
    return torch.linalg.inv(hessian[column:, column:])


def swept(weight: Tensor, hessian: Tensor, settled: Callable[[int, Tensor], Tensor]) -> Tensor:
    """Column after column becomes what ``settled`` says of it, and those behind it change as costs least.

    Args:
        weight: [N, K].
        hessian: float64 [K, K].
        settled: from a column's number and the weight as it is by then to the column's values [N].
    """
    current = weight.double().clone()
    for column in range(weight.shape[1]):
        inverse = remaining_inverse(hessian, column)
        error = current[:, column] - settled(column, current)
        current[:, column:] -= torch.outer(error, inverse[0] / inverse[0, 0])
    return current


def layer_error(change: Tensor, x: Tensor) -> float:
    """``‖X ΔWᵀ‖²``."""
    return float((x.double() @ change.double().T).square().sum())


def correlated(tokens: int, channels: int, seed: int = 0) -> Tensor:
    """Inputs of which each channel has something of all others, some of them much more than the rest."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(channels, channels, generator=generator) / channels**0.5 + 0.5 * torch.eye(channels)
    strength = torch.rand(channels, generator=generator) * 3 + 0.1
    return torch.randn(tokens, channels, generator=generator) @ mixing * strength
