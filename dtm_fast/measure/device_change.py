"""One decoder layer on differences to the base, by torch's operations: float32's answers from products of bfloat16.

What ``Arithmetic.CHANGE`` is for the fused kernel: `y' = y + W' (x' - x) + (W' - W) x`, where x and y are the base's
and known in float32. Only what differs is rounded to bfloat16, and products are summed in float32; everything between
them is float32. On a GPU its products run on tensor cores, which those of float32 cannot.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dtm_fast.measure.device_layer import DeviceLayer, KeysAndValues
from dtm_fast.measure.device_rows import (
    add_norm,
    attend,
    change_gated,
    change_norm,
    gated,
    rms_norm,
    rotate,
)

_MLP_ROWS = 2**14  # positions whose gates are held at a time


@dataclass(frozen=True, eq=False)
class BaseStates:
    """What the base has within a layer, float32 [P, T, columns] each.

    Attributes:
        qkv: queries, keys and values side by side, as the products give them.
        attention: what the attention gives.
        middle: the residual stream behind it.
        gate_up: gates and ups side by side.
    """

    qkv: Tensor
    attention: Tensor
    middle: Tensor
    gate_up: Tensor

    def of(self, rows: Sequence[int], first: int, end: int) -> "BaseStates":
        """Those of some of the rows and positions."""
        tensors = (self.qkv, self.attention, self.middle, self.gate_up)
        if list(rows) == list(range(len(self.qkv))):
            return BaseStates(*(each[:, first:end] for each in tensors))
        index = torch.tensor(list(rows), device=self.qkv.device)
        return BaseStates(*(each[index, first:end] for each in tensors))


@dataclass(frozen=True, eq=False)
class TreatedWeight:
    """A projection's weight under a treatment: bfloat16 [N, K] each.

    Attributes:
        weight: W'.
        change: W' - W, rounded after the subtraction.
    """

    weight: Tensor
    change: Tensor


def base_states(layer: DeviceLayer, x: Tensor, weights: Mapping[str, Tensor]) -> tuple[BaseStates, Tensor]:
    """What a layer computes of the base's state before it, and the state behind; arguments as ``DeviceLayer.run``."""
    parts, paths, eps = layer.parts, layer.paths, layer.parts.shape.eps
    products = [
        (weights.get(path, module.weight), module.bias)
        for path, (_, module) in zip(paths, parts.projections, strict=True)
    ]
    ins = len(parts.attention_in)
    normed = rms_norm(x, layer.attention_norm, eps)
    qkv = torch.cat([F.linear(normed, *each) for each in products[:ins]], dim=-1)
    attention, _ = _attention(layer, qkv, None, 0)
    middle, normed = add_norm(x, F.linear(attention, *products[ins]), layer.mlp_norm, eps)
    gate_up = torch.cat([F.linear(normed, *each) for each in products[ins + 1 : -1]], dim=-1)
    out = middle + F.linear(gated(*gate_up.chunk(2, dim=-1)), *products[-1])
    return BaseStates(qkv, attention, middle, gate_up), out


def run_change(
    layer: DeviceLayer,
    x: Tensor,
    base: BaseStates,
    change: Tensor | None,
    rounded: Sequence[Tensor],
    treated: Mapping[int, TreatedWeight],
    earlier: KeysAndValues | None = None,
    skip: int = 0,
) -> tuple[Tensor, KeysAndValues | None]:
    """By how much the state behind a layer differs from the base's, and the keys and values of all positions so far.

    Args:
        layer: its modules and vectors.
        x: float32 [R, T, hidden], the base's state before it.
        base: of the same rows and positions.
        change: float32 [R, T, hidden], by how much the state before it differs; None: not at all.
        rounded: the base's weights in bfloat16, by projection.
        treated: those that are not the base's, by projection.
        earlier: keys and values of the positions before; None also where these are the base's.
        skip: of so many of the positions only keys and values are wanted; what is returned of them is 0.

    Returns:
        The difference, and keys and values; None where these are the base's.
    """
    eps, ins = layer.parts.shape.eps, len(layer.parts.attention_in)
    weights = _Weights(rounded, treated)
    known: KeysAndValues | None = None
    d_attention = None
    if change is not None or any(index < ins for index in treated):
        dn = None if change is None else change_norm(x.contiguous(), change, layer.attention_norm, eps)
        n = _once(lambda: rms_norm(x.contiguous(), layer.attention_norm, eps))
        qkv = base.qkv.clone()
        for index, columns in enumerate(_columns(layer)):
            d = weights.moved(index, dn, n)
            if d is not None:
                qkv[..., columns] += d
        attention, known = _attention(layer, qkv, earlier, skip)
        d_attention = attention - base.attention[:, skip:]
    change = None if change is None else change[:, skip:]
    change = _sum(change, weights.moved(ins, d_attention, lambda: base.attention[:, skip:]))
    out = torch.zeros_like(x)
    if change is not None:
        out[:, skip:] = change
    if change is not None or any(index > ins for index in treated):
        middle, gate_up = (
            each[:, skip:].flatten(0, 1).split(_MLP_ROWS) for each in (base.middle, base.gate_up)
        )
        changes = [None] * len(middle) if change is None else change.flatten(0, 1).split(_MLP_ROWS)
        found = [_mlp(layer, weights, *part) for part in zip(middle, changes, gate_up, strict=True)]
        if found:
            out[:, skip:] += torch.cat(found).view_as(out[:, skip:])
    return out, known


@dataclass(frozen=True, eq=False)
class _Weights:
    """As ``run_change`` takes them."""

    rounded: Sequence[Tensor]
    treated: Mapping[int, TreatedWeight]

    def moved(self, index: int, d: Tensor | None, of_base: Callable[[], Tensor]) -> Tensor | None:
        """By how much what a projection gives differs, where its input is ``of_base()`` and differs by ``d``."""
        own = self.treated.get(index)
        by_input = None if d is None else _product(d, self.rounded[index] if own is None else own.weight)
        return by_input if own is None else _sum(by_input, _product(of_base(), own.change))


def _mlp(
    layer: DeviceLayer, weights: _Weights, middle: Tensor, change: Tensor | None, gate_up: Tensor
) -> Tensor:
    """By how much what the MLP adds differs, where its input ``middle`` [R, hidden] does by ``change``."""
    eps, ins, last = layer.parts.shape.eps, len(layer.parts.attention_in), len(layer.paths) - 1
    dn = (
        None if change is None else change_norm(middle.contiguous(), change.contiguous(), layer.mlp_norm, eps)
    )
    n = _once(lambda: rms_norm(middle.contiguous(), layer.mlp_norm, eps))
    gate, up = gate_up.chunk(2, dim=-1)
    ds = [weights.moved(index, dn, n) for index in range(ins + 1, last)]
    if len(ds) == 1 and ds[0] is not None:
        ds = list(ds[0].chunk(2, dim=-1))
    dh = None if all(each is None for each in ds) else change_gated(gate, up, *ds)
    found = weights.moved(last, dh, lambda: gated(gate, up))
    return torch.zeros_like(middle) if found is None else found


def _attention(
    layer: DeviceLayer, qkv: Tensor, earlier: KeysAndValues | None, skip: int
) -> tuple[Tensor, KeysAndValues]:
    """What the attention gives [R, T - skip, columns], and the keys and values of all positions so far."""
    shape = layer.parts.shape
    first = 0 if earlier is None else earlier[0].shape[1]
    heads = qkv.unflatten(-1, (-1, shape.head_dim))
    q, k, v = heads.split([shape.heads, shape.kv_heads, shape.kv_heads], dim=2)
    q = q[:, skip:]
    if layer.q_norm is not None:
        q = rms_norm(q.contiguous(), layer.q_norm, shape.eps)
    if layer.k_norm is not None:
        k = rms_norm(k.contiguous(), layer.k_norm, shape.eps)
    end = first + qkv.shape[1]
    q = rotate(q, layer.cosine[first + skip : end], layer.sine[first + skip : end])
    k = rotate(k, layer.cosine[first:end], layer.sine[first:end])
    if earlier is not None:
        k, v = (torch.cat(pair, dim=1) for pair in zip(earlier, (k, v), strict=True))
    return attend(q, k, v, shape.attention_scale).flatten(2), (k, v)


def _columns(layer: DeviceLayer) -> list[slice]:
    """Where the products of each projection in front of the attention lie in ``BaseStates.qkv``."""
    found, first = [], 0
    for _, module in layer.parts.attention_in:
        found.append(slice(first, first + len(module.weight)))
        first += len(module.weight)
    return found


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """``x`` [..., K] rounded to bfloat16 times ``weight`` [N, K], summed and kept in float32."""
    rows = x.flatten(0, -2).bfloat16()
    product: Tensor
    if rows.device.type == "cuda":
        product = torch.mm(rows, weight.t(), out_dtype=torch.float32)
    else:  # torch's product of bfloat16 would round what it gives
        product = rows.float() @ weight.float().t()
    return product.view(*x.shape[:-1], len(weight))


def _once(make: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """What ``make`` gives, made when it is first asked for."""
    return functools.cache(make)


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b
