"""What stands between the products of a layer of Llama's kind, on any device, rounded as transformers rounds it.

Each is one Triton kernel where there is a GPU and Triton, and else the operations of torch that transformers uses. In
bfloat16 transformers' ten operations for a norm or a rotation move three to eight times the bytes, a fifth of a layer's
time on an H100.
"""

import functools
from types import ModuleType
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from dtm_fast.ops import native


def has_triton(device: torch.device) -> bool:
    """Whether the kernels run for tensors of this device."""
    return device.type == "cuda" and native.why_no_triton() is None


@functools.cache
def _kernels() -> ModuleType:
    from dtm_fast.triton_kernels import layer_rows

    return layer_rows


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``weight * (x / rms(x))``, the quotient computed in float32 and rounded before the product.

    Args:
        x: [..., D], contiguous.
        weight: [D], in the dtype of x.
        eps: added to the mean square.
    """
    if has_triton(x.device):
        return cast(Tensor, _kernels().rms_norm(x, weight, eps))
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def add_norm(x: Tensor, branch: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``x + branch`` and its ``rms_norm``; x and branch [..., D], of which x need not be contiguous."""
    if has_triton(x.device):
        return cast(tuple[Tensor, Tensor], _kernels().add_norm(x, branch, weight, eps))
    total = x + branch
    return total, rms_norm(total, weight, eps)


def change_norm(x: Tensor, change: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``rms_norm(x + change) - rms_norm(x)``, computed in float32 and rounded to bfloat16; all float32, contiguous."""
    if has_triton(x.device):
        return cast(Tensor, _kernels().change_norm(x, change, weight, eps))
    return (rms_norm(x + change, weight, eps) - rms_norm(x, weight, eps)).bfloat16()


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """``x * cosine + rotate_half(x) * sine``.

    Args:
        x: [R, T, heads, head_dim], the last two contiguous.
        cosine: [T, head_dim], contiguous; sine likewise.
    """
    if has_triton(x.device):
        return cast(Tensor, _kernels().rotate(x, cosine, sine))
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
    return x * cosine[:, None] + turned * sine[:, None]


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up``; both [..., I], rows of equal strides."""
    if has_triton(gate.device):
        return cast(Tensor, _kernels().gated(gate, up))
    return F.silu(gate) * up


def change_gated(gate: Tensor, up: Tensor, d_gate: Tensor | None, d_up: Tensor | None) -> Tensor:
    """``gated(gate + d_gate, up + d_up) - gated(gate, up)``, in float32 and rounded to bfloat16.

    Args:
        gate: float32 [R, I], of any row stride; up likewise.
        d_gate: float32 [R, I]; None where the gate is the same, and d_up likewise, but not both.
    """
    if has_triton(gate.device):
        return cast(Tensor, _kernels().change_gated(gate, up, d_gate, d_up))
    moved = (each if d is None else each + d for each, d in ((gate, d_gate), (up, d_up)))
    return (gated(*moved) - gated(gate, up)).bfloat16()


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention of the last positions: [R, Tq, heads, head_dim].

    Args:
        q: [R, Tq, heads, head_dim], Tq <= T.
        k: [R, T, kv heads, head_dim]; v likewise.
        scale: of the scores.
    """
    own, all_of_them, groups = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    options: dict[str, Any] = {"scale": scale}
    if own == all_of_them:
        # As transformers calls it, so that the same kernel answers.
        options |= {"is_causal": own > 1} | ({"enable_gqa": True} if groups > 1 else {})
    else:
        if groups > 1:
            k, v = (each.repeat_interleave(groups, dim=2) for each in (k, v))
        ones = torch.ones(own, all_of_them, dtype=torch.bool, device=q.device)
        options["attn_mask"] = ones.tril(all_of_them - own)
    q, k, v = (each.transpose(1, 2) for each in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)
