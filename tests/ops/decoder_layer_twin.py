"""Decoder layers with random weights, how they are packed, and the reference twin of the fused decoder layer."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtm_fast.model.gated_decoder import LayerParts
from dtm_fast.ops import native
from dtm_fast.ops.decoder_layer import States
from dtm_fast.ops.layer_weights import (
    Arithmetic,
    DecoderLayer,
    LayerShape,
    PackedMatrix,
    Projection,
    has_arithmetic,
)

SMALL = LayerShape(hidden=20, heads=2, kv_heads=1, head_dim=6, intermediate=32, eps=1e-5, attention_scale=0.4)


def needs(*arithmetics: Arithmetic) -> None:
    """Skips a test that the instruction set in use has no kernel for."""
    for each in arithmetics:
        if not has_arithmetic(each):
            pytest.skip(f"{native.cpu_isa()} has no kernel for layers in {each.name.lower()}")


def random_parts(shape: LayerShape, *, positions: int, fused: bool, bias: bool, norms: bool) -> LayerParts:
    """A layer with random weights that keep its states near 1."""

    def side_by_side(depth: int, *columns: int) -> tuple[tuple[str, nn.Linear], ...]:
        return tuple(("", linear(depth, each)) for each in ((sum(columns),) if fused else columns))

    def linear(depth: int, columns: int) -> nn.Linear:
        made = nn.Linear(depth, columns, bias=bias).requires_grad_(False)
        made.weight.copy_(torch.randn(columns, depth) * depth**-0.5)
        return made

    kv, head = shape.kv_heads * shape.head_dim, shape.head_dim
    angles = torch.rand(positions, head) * 6.28
    return LayerParts(
        shape,
        attention_norm=1 + 0.3 * torch.randn(shape.hidden),
        mlp_norm=1 + 0.3 * torch.randn(shape.hidden),
        q_norm=1 + 0.3 * torch.randn(head) if norms else None,
        k_norm=1 + 0.3 * torch.randn(head) if norms else None,
        cosine=angles.cos(),
        sine=angles.sin(),
        attention_in=side_by_side(shape.hidden, shape.heads * head, kv, kv),
        attention_out=("", linear(shape.heads * head, shape.hidden)),
        mlp_in=side_by_side(shape.hidden, shape.intermediate, shape.intermediate),
        mlp_out=("", linear(shape.intermediate, shape.hidden)),
    )


def twin(parts: LayerParts, x: Tensor) -> tuple[Tensor, States]:
    """The layer in float64: what leaves it, and its states."""
    shape, (rows, length, _) = parts.shape, x.shape

    def norm(x: Tensor, weight: Tensor | None) -> Tensor:
        return x if weight is None else F.rms_norm(x, x.shape[-1:], weight.double(), shape.eps)

    def product(x: Tensor, *several: tuple[str, nn.Linear]) -> Tensor:
        biases = [None if each.bias is None else each.bias.double() for _, each in several]
        return torch.cat(
            [F.linear(x, each.weight.double(), b) for (_, each), b in zip(several, biases, strict=True)], -1
        )

    def heads(x: Tensor, count: int, weight: Tensor | None) -> Tensor:
        x = norm(x.view(rows, length, count, shape.head_dim), weight).transpose(1, 2)
        low, high = x.chunk(2, dim=-1)
        return x * parts.cosine[:length].double() + torch.cat([-high, low], -1) * parts.sine[:length].double()

    x = x.double()
    qkv = product(norm(x, parts.attention_norm), *parts.attention_in)
    kv = shape.kv_heads * shape.head_dim
    q, k, v = qkv.split([shape.heads * shape.head_dim, kv, kv], -1)
    q, k = heads(q, shape.heads, parts.q_norm), heads(k, shape.kv_heads, parts.k_norm)
    v = v.view(rows, length, shape.kv_heads, shape.head_dim).transpose(1, 2)
    k, v = (each.repeat_interleave(shape.heads // shape.kv_heads, 1) for each in (k, v))
    later = torch.ones(length, length, dtype=torch.bool).triu(1)
    weights = (q @ k.mT * shape.attention_scale).masked_fill(later, -torch.inf).softmax(-1)
    attention = (weights @ v).transpose(1, 2).flatten(2)
    mid = x + product(attention, parts.attention_out)
    gate_up = product(norm(mid, parts.mlp_norm), *parts.mlp_in)
    gate, up = gate_up.chunk(2, -1)
    return mid + product(F.silu(gate) * up, parts.mlp_out), States(x, qkv, attention, mid, gate_up)


def packed(parts: LayerParts, arithmetic: Arithmetic) -> DecoderLayer:
    """As measure/fused_layers.py packs a layer."""

    def side_by_side(several: Sequence[tuple[str, nn.Linear]]) -> tuple[Projection, ...]:
        found: list[Projection] = []
        for _, module in several:
            bias = None if module.bias is None else module.bias.detach().float().contiguous()
            first = found[-1].first + found[-1].weight.N if found else 0
            found.append(Projection(PackedMatrix.pack(module.weight, arithmetic), first, bias))
        return tuple(found)

    as_they_are = ("shape", "attention_norm", "mlp_norm", "q_norm", "k_norm", "cosine", "sine")
    return DecoderLayer(
        arithmetic,
        **{name: getattr(parts, name) for name in as_they_are},
        attention_in=side_by_side(parts.attention_in),
        attention_out=side_by_side([parts.attention_out])[0],
        mlp_in=side_by_side(parts.mlp_in),
        mlp_out=side_by_side([parts.mlp_out])[0],
    )


def treated(layer: DecoderLayer, parts: LayerParts, index: int, weight: Tensor) -> DecoderLayer:
    """With another weight in projection number ``index``, from where on it differs from the base."""
    change = None
    if layer.arithmetic.is_change:
        change = PackedMatrix.pack(weight - parts.projections[index][1].weight, layer.arithmetic)
    projection = replace(
        layer.projections[index], weight=PackedMatrix.pack(weight, layer.arithmetic), change=change
    )
    return replace(layer.with_projection(index, projection), start=layer.start_of(index))
