"""One decoder layer of Llama's kind by torch's operations, on a part of the text behind those that were read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dtm_fast.errors import ModelError
from dtm_fast.measure.device_rows import add_norm, attend, gated, rms_norm, rotate
from dtm_fast.model import Decoder
from dtm_fast.model.gated_decoder import LayerParts, parts_of
from dtm_fast.model.stepping import LayerCall, has_plain_head, record

_MOST_HEAD_DIM = 256  # beyond, torch has no fused attention
_MLP_ROWS = 2**15  # positions whose gates are held at a time

# How far a layer may be from transformers' own, in units of what the layer adds to its input.
_DEVIATION = {torch.float32: 2e-5, torch.bfloat16: 0.02}

KeysAndValues = tuple[Tensor, Tensor]
"""Each [R, positions, kv heads, head_dim]."""


@dataclass(frozen=True, eq=False)
class DeviceLayer:
    """A layer's modules and vectors, in the model's dtype on its device.

    Every result is rounded where transformers stores it, so that on the same rows and positions both have the same
    bits, but for Triton's kernels, which add up the squares of a norm in another order.
    """

    parts: LayerParts
    paths: tuple[str, ...]
    """Of its projections, as components."""
    attention_norm: Tensor
    mlp_norm: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    cosine: Tensor
    sine: Tensor

    @torch.no_grad()
    def run(
        self,
        x: Tensor,
        weights: Mapping[str, Tensor],
        earlier: KeysAndValues | None = None,
        skip: int = 0,
        out: Tensor | None = None,
    ) -> tuple[Tensor, KeysAndValues]:
        """The state after the layer, and the keys and values of all positions so far.

        Args:
            x: [R, T, hidden], the state before it.
            weights: path → weight of the projections that are not as in the model.
            earlier: of the positions before.
            skip: of so many of the positions only keys and values are wanted; their state holds nothing of use.
            out: where the state after the layer goes, which may be ``x`` itself.
        """
        shape, ins = self.parts.shape, len(self.parts.attention_in)
        first = 0 if earlier is None else earlier[0].shape[1]
        end = first + x.shape[1]
        normed = rms_norm(x, self.attention_norm, shape.eps)
        wanted = normed[:, skip:].contiguous()
        if ins == 1:
            columns = [heads * shape.head_dim for heads in (shape.heads, shape.kv_heads, shape.kv_heads)]
            q, k, v = self._times(0, normed, weights).split(columns, dim=-1)
            q = q[:, skip:]
        else:
            q, k, v = (self._times(i, each, weights) for i, each in enumerate((wanted, normed, normed)))
        q, k, v = (each.unflatten(-1, (-1, shape.head_dim)) for each in (q, k, v))
        if self.q_norm is not None:
            q = rms_norm(q, self.q_norm, shape.eps)
        if self.k_norm is not None:
            k = rms_norm(k, self.k_norm, shape.eps)
        q = rotate(q, self.cosine[first + skip : end], self.sine[first + skip : end])
        k = rotate(k, self.cosine[first:end], self.sine[first:end])
        if earlier is not None:
            k, v = (torch.cat(pair, dim=1) for pair in zip(earlier, (k, v), strict=True))
        attention = attend(q, k, v, shape.attention_scale).flatten(2)
        branch = self._times(ins, attention, weights)
        middle, normed = add_norm(x[:, skip:], branch, self.mlp_norm, shape.eps)
        out = torch.empty_like(x) if out is None else out
        torch.add(middle, self._mlp(ins + 1, normed, weights), out=out[:, skip:])
        return out, (k, v)

    def _times(self, index: int, x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        _, module = self.parts.projections[index]
        return F.linear(x, weights.get(self.paths[index], module.weight), module.bias)

    def _mlp(self, first: int, x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        last = len(self.paths) - 1
        found = []
        for some in x.flatten(0, 1).split(_MLP_ROWS):
            ins = [self._times(index, some, weights) for index in range(first, last)]
            gate, up = ins if len(ins) == 2 else ins[0].chunk(2, dim=-1)
            found.append(self._times(last, gated(gate, up), weights))
        return (found[0] if len(found) == 1 else torch.cat(found)).view_as(x)


def device_layers_of(decoder: Decoder, tokens: Tensor) -> list[DeviceLayer]:
    """Every layer, compared with what transformers' own makes of its own input.

    Args:
        decoder: of a causal language model in eval mode.
        tokens: int64 [b, T], some probes.

    Raises:
        ModelError: the layers are not of this kind, or do not compute what transformers' do; the message says why.
    """
    if decoder.model.dtype not in _DEVIATION:
        raise ModelError(f"the model is in {decoder.model.dtype}, and parts are read in float32 and bfloat16")
    calls, states = record(decoder, tokens)
    if not has_plain_head(decoder.model, calls, tokens, states[-1]):
        raise ModelError("the model's logits are more than a product with one weight")
    paths = {(each.layer, each.name): path for path, each in decoder.components.items()}
    found: list[DeviceLayer] = []
    for number, (call, before, after) in enumerate(zip(calls, states[:-1], states[1:], strict=True)):
        layer = _layer_of(call, number, paths)
        if isinstance(layer, str):
            raise ModelError(layer)
        if found and layer.parts.shape != found[0].parts.shape:
            raise ModelError(f"layer {number} has other sizes than the first")
        deviation, added = _deviation(layer, before, after), float((after.float() - before.float()).norm())
        if not deviation <= _DEVIATION[decoder.model.dtype] * added:  # which may be nothing
            raise ModelError(
                f"layer {number} is not what is read in parts: "
                f"it differs by {deviation:.1g} where it adds {added:.1g}"
            )
        found.append(layer)
    return found


def _layer_of(call: LayerCall, number: int, paths: Mapping[tuple[int, str], str]) -> DeviceLayer | str:
    parts = parts_of(call, _MOST_HEAD_DIM)
    if isinstance(parts, str):
        return parts
    names = [name for name, _ in parts.projections]
    if any((number, name) not in paths for name in names):
        return f"layer {number} has projections that are no components"
    like = parts.projections[0][1].weight

    def vector(value: Tensor) -> Tensor:
        return value.to(like.device, like.dtype)

    return DeviceLayer(
        parts,
        tuple(paths[number, name] for name in names),
        vector(parts.attention_norm),
        vector(parts.mlp_norm),
        None if parts.q_norm is None else vector(parts.q_norm),
        None if parts.k_norm is None else vector(parts.k_norm),
        vector(parts.cosine),
        vector(parts.sine),
    )


def _deviation(layer: DeviceLayer, before: Tensor, after: Tensor) -> float:
    """Of the layer in one part and in two from transformers' own, the larger."""
    half = before.shape[1] // 2
    whole, _ = layer.run(before, {})
    start, earlier = layer.run(before[:, :half].contiguous(), {})
    rest, _ = layer.run(before[:, half:].contiguous(), {}, earlier)
    read = (whole, torch.cat([start, rest], dim=1))
    return max(float((each.float() - after.float()).norm()) for each in read)


def moved(earlier: KeysAndValues, rows: Sequence[int]) -> KeysAndValues:
    """Those of some of the rows."""
    index = torch.tensor(list(rows), device=earlier[0].device)
    keys, values = earlier
    return keys[index], values[index]
