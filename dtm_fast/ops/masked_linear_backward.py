"""The gradients of masked_linear.

With w ⊙ m the weight that a mask keeps, y = x (w ⊙ m)ᵀ + b gives, summed over the masks if there are several,

    dx = dy (w ⊙ m)        dw = (dyᵀ x) ⊙ m        db = the sum of dy over tokens

so a weight that is masked out adds nothing to dx, even if it is NaN, and its own gradient is exactly 0, whatever
dy and x hold. The products are torch's: dx holds one masked copy of the weight while it is computed, dw an
unmasked copy of itself; several masks are taken one after the other and summed in float32. The order of these
sums is torch's too, and may depend on the batch and the threads. All steps are differentiable in turn.

Whether the masks are nested makes no difference. The twin is what torch derives from masked_linear_reference, or
from masked_ladder_reference.
"""

import math
from collections.abc import Callable
from typing import Any

import torch

# The operator, not the function: when torch.compile traces the backward, the tensors hold no data.
from dtm_fast.ops.apply_mask import OPERATOR as APPLY_MASK

Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, str | None], torch.Tensor]


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    """Keep what the gradients that are needed depend on."""
    x, weight, mask, _, ctx.backend, _ = inputs
    needs_dx, needs_dw = ctx.needs_input_grad[:2]
    ctx.save_for_backward(x if needs_dw else None, weight if needs_dx else None, mask)


def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """The gradients of x, weight, mask, bias, backend and nested, from dy [..., N] or [V, ..., N]."""
    x, weight, mask = ctx.saved_tensors
    leading = dy.shape[mask.dim() - 2 : -1]  # those of x
    rows = math.prod(leading)
    dy = dy.reshape(*mask.shape[:-2], rows, dy.shape[-1])
    dx = dw = db = None
    if weight is not None:
        dx = _summed(_dx, dy, weight, mask, ctx.backend, rows).reshape(*leading, weight.shape[1])
    if x is not None:
        dw = _summed(_dw, dy, x.reshape(rows, x.shape[-1]), mask, ctx.backend, dy.shape[-1])
    if any(ctx.needs_input_grad[3:4]):  # torch leaves out arguments that have their default value
        db = dy.flatten(0, -2).sum(0)
    return dx, dw, None, db, None, None


def _dx(dy: torch.Tensor, weight: torch.Tensor, mask: torch.Tensor, backend: str | None) -> torch.Tensor:
    dx: torch.Tensor = dy @ APPLY_MASK(weight, mask, backend)
    return dx


def _dw(dy: torch.Tensor, x: torch.Tensor, mask: torch.Tensor, backend: str | None) -> torch.Tensor:
    dw: torch.Tensor = APPLY_MASK(dy.mT @ x, mask, backend)
    return dw


def _summed(
    product: Product,
    dy: torch.Tensor,
    factor: torch.Tensor,
    mask: torch.Tensor,
    backend: str | None,
    rows: int,
) -> torch.Tensor:
    """product(dy, factor, mask), [rows, K]; for V masks the sum over them, rounded once."""
    if mask.dim() == 2:
        return product(dy, factor, mask, backend)
    total = factor.new_zeros((rows, factor.shape[1]), dtype=torch.float32)
    for each_dy, each_mask in zip(dy, mask, strict=True):
        total += product(each_dy, factor, each_mask, backend)
    return total.to(factor.dtype)
