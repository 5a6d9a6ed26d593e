"""The layers of a decoder of Llama's kind by the fused kernel, on states that are kept of the base."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dtm_fast.compression import Configuration, Treatment, compressed_weight
from dtm_fast.errors import ModelError
from dtm_fast.measure.compressed_weights import CompressedWeights
from dtm_fast.measure.model_layers import ModelLayers
from dtm_fast.measure.prefix_tree import layers_of
from dtm_fast.measure.tensor_store import TensorStore
from dtm_fast.model import Component, Decoder
from dtm_fast.model.gated_decoder import LayerParts, parts_of
from dtm_fast.model.stepping import has_plain_head, record
from dtm_fast.ops import native
from dtm_fast.ops.decoder_layer import States, decoder_layer, new_states
from dtm_fast.ops.layer_weights import Arithmetic, DecoderLayer, PackedMatrix, Projection, has_arithmetic

# How far a layer may be from transformers' own, in units of what the layer adds to its input.
_DEVIATION = {Arithmetic.FLOAT32: 2e-5, Arithmetic.BFLOAT16: 0.05}

# In which parts a completion is read, as shares of it. Each part makes the weights come anew, which takes as long as
# some hundred positions; on SmolLM2, of 1 to 4 parts two were best for changes small and large. A referee may stop
# after each.
_PARTS = (1 / 3, 1)
_PARTS_WITH_REFEREE = (1 / 4, 2 / 4, 3 / 4, 1)

# Layers in float32 beside those for differences are a second copy of the model: bytes up to which it is kept.
_SECOND_COPY = 512 * 2**20


class FusedLayers:
    """Runs layers on some of the probes and some of their positions.

    The base is the model as it is, or one of its configurations. A state is a float32 tensor [R, T, hidden] for R of
    the probes: the residual stream, or for a change its difference to the base's; None is the base's own.

    Args:
        parts: the layers', from ``checked_parts``.
        model_layers: the same layers by transformers, on the CPU.
        store: keeps the base's states between the layers.
        memory: bytes that the base's states within the layers may take: those of the last layers are kept first,
            and a layer without them is slower. None for no bound.
    """

    shares_parts = True

    def __init__(
        self,
        parts: list[LayerParts],
        model_layers: ModelLayers,
        store: TensorStore,
        memory: int | None = None,
    ) -> None:
        """Computes the base's states."""
        probes = model_layers.probes
        self.decoder = model_layers.decoder
        self.depth = len(parts)
        self.count = len(probes)
        self.positions = probes.tokens.shape[1] - 1  # nothing follows the last token
        self.shape = parts[0].shape
        self.exact = _exact(self.decoder)
        self._changes = [
            each
            for each in (Arithmetic.CHANGE, Arithmetic.FINE_CHANGE)
            if self.exact == Arithmetic.FLOAT32 and has_arithmetic(each)
        ]
        self._parts = parts
        weights = [module.weight for each in parts for _, module in each.projections]
        self._has_second_copy = 4 * sum(weight.numel() for weight in weights) <= _SECOND_COPY
        self._model_layers = model_layers
        self._store = store
        self._packed: dict[tuple[int, Arithmetic], DecoderLayer] = {}
        self._weights = CompressedWeights()
        self.treatments: Mapping[int, Configuration] = {}
        """What the base has of them, by layer."""
        self._origin: FusedLayers | None = None
        self._kv: dict[int, Tensor] = {}
        self._inner: dict[int, States] = {}
        self._norm: Any = self.decoder.model.base_model.norm
        self._record(memory)

    def rebased(
        self, configuration: Configuration, memory: int | None = None, rooms: Sequence[States] = ()
    ) -> "FusedLayers":
        """The same layers on the states of a configuration that ``can_run_in_parts``, kept in ``rooms`` first."""
        assert self._origin is None
        assert self.can_run_in_parts(configuration)
        other = copy.copy(self)
        other._origin = self
        other.treatments = layers_of(self.decoder, configuration)
        other._store = TensorStore(memory)
        other._packed, other._kv, other._inner = {}, {}, {}
        other._record(memory, rooms)
        return other

    def states_given_up(self) -> list[States]:
        """Its states within the layers, for others to write to; it cannot run any more."""
        states, self._inner = list(self._inner.values()), {}
        self._store = TensorStore()
        return states

    @property
    def of_the_model(self) -> "FusedLayers":
        """Those on the model's own states."""
        return self._origin or self

    @property
    def arithmetic(self) -> Arithmetic:
        """The fastest one."""
        return (*self._changes, self.exact)[0]

    @property
    def finer(self) -> tuple[Arithmetic, ...]:
        """What settles doubts that the fastest one leaves, one after the other; the last is exact."""
        return (*self._changes[1:], self.exact)

    @property
    def engine(self) -> str:
        """What runs, in a few words."""
        return f"fused layers, {self.arithmetic.name.lower()}"

    def shares(self, has_referee: bool) -> Sequence[float]:
        """In which parts to read a completion: the end of each, as a share of it."""
        return _PARTS_WITH_REFEREE if has_referee else _PARTS

    def base(self, layer: int, rows: Sequence[int], first: int = 0, end: int | None = None) -> Tensor:
        """The base's residual stream before ``layer``, [R, T, hidden]."""
        return self._store[layer][list(rows), first:end]

    def can_run_in_parts(self, treatments: Configuration) -> bool:
        """Whether a layer with these treatments can be run on some of the positions."""
        return all(self._is_known(path, treatments) for path in treatments)

    def largest_change(self, by_layer: Mapping[int, Configuration]) -> float:
        """As ``PartLayers.largest_change``."""
        found = [0.0]
        for layer in {**self.treatments, **by_layer}:
            for component, _, own, its in self._differing(layer, by_layer.get(layer, {})):
                found.append(self._weights.relative_change(component, own, self.arithmetic, its))
        return max(found)

    def run(
        self,
        layer: int,
        treatments: Configuration,
        x: Tensor | None,
        arithmetic: Arithmetic,
        rows: Sequence[int],
        first: int = 0,
        end: int | None = None,
        first_output: int = 0,
        lengths: Sequence[int] | None = None,
        kv: Tensor | None = None,
    ) -> Tensor:
        """The state after a layer.

        Args:
            layer: its number.
            treatments: of its components.
            x: the state before it, for positions first .. end - 1.
            arithmetic: the fastest or one of the finer ones.
            rows: which probes these are.
            first: the first position; those before it must have been run with the same treatments below.
            end: behind the last position.
            first_output: of positions before this one only keys and values are wanted.
            lengths: how many positions each row has, at most all.
            kv: [R, positions, 2 * kv columns] to hold keys and values; by default, rows of what belongs to the layer.
        """
        end = self.positions if end is None else end
        if arithmetic.is_change and layer not in self._inner:
            state = self.base(layer, rows, first, end)
            state = state if x is None else state + x
            out = self.run(layer, treatments, state, self.exact, rows, first, end, first_output, lengths, kv)
            return out - self.base(layer + 1, rows, first, end)
        if not self.can_run_in_parts(treatments):
            return self._run_model(layer, treatments, x, arithmetic, rows)
        weights = self._treated(layer, treatments, arithmetic, from_base=x is None)
        if x is None and arithmetic == self.exact:
            x = self.base(layer, rows, first, end)
        out = torch.empty(len(rows), end - first, self.shape.hidden, dtype=torch.float32, device="cpu")
        decoder_layer(
            weights,
            x,
            out,
            self._kv_of(layer) if kv is None else kv,
            first=first,
            first_output=first_output,
            lengths=lengths,
            rows=rows,
            kv_rows=rows if kv is None else None,
            base=replace(self._inner.get(layer, States()), input=self._store[layer]),
        )
        return out

    def head_input(
        self, state: Tensor | None, arithmetic: Arithmetic, rows: Sequence[int], first: int, end: int
    ) -> Tensor:
        """What the head multiplies: the final norm of a state of positions first .. end - 1."""
        if state is None or arithmetic.is_change:
            base = self.base(self.depth, rows, first, end)
            state = base if state is None else base + state
        return self._norm(state.to(self.decoder.model.dtype))  # type: ignore[no-any-return]

    def new_kv(self, rows: int) -> Tensor:
        """Room for the keys and values of so many rows."""
        width = 2 * self.shape.kv_heads * self.shape.head_dim
        return torch.empty(rows, self.positions, width, dtype=torch.float32, device="cpu")

    def _kv_of(self, layer: int) -> Tensor:
        if layer not in self._kv:
            self._kv[layer] = self.new_kv(self.count)
        return self._kv[layer]

    def _record(self, memory: int | None, rooms: Sequence[States] = ()) -> None:
        rooms = list(rooms)
        size = 4 * self.count * self.positions * (sum(self.shape.widths.values()) - self.shape.hidden)
        x = self._model_layers.entering(0)[:, : self.positions].float().contiguous()
        # Beside those of every layer, the store has the model's own first and last state, but for a configuration.
        others = self._store.in_memory + (self.depth + 1) * x.nbytes
        left = None if memory is None else memory - others
        kept = self.depth if left is None else min(self.depth, max(0, left) // size)
        kv = self.new_kv(self.count)
        for layer in range(self.depth):
            self._store.put(layer, x)
            out, keep = torch.empty_like(x), States()
            if layer >= self.depth - kept:
                keep = rooms.pop() if rooms else new_states(self.shape, *x.shape[:2])
                self._inner[layer] = keep
            decoder_layer(self._layer(layer, self.exact), x, out, kv, keep=keep)
            x = out
        self._store.put(self.depth, x)

    def _layer(self, layer: int, arithmetic: Arithmetic) -> DecoderLayer:
        key = (layer, arithmetic)
        if key not in self._packed:
            if not self._keeps(arithmetic):
                self._packed = {k: v for k, v in self._packed.items() if k[1] != arithmetic}
            self._packed[key] = self._pack(layer, arithmetic)
        return self._packed[key]

    @torch.no_grad()
    def _pack(self, layer: int, arithmetic: Arithmetic) -> DecoderLayer:
        if self._origin is None and arithmetic == Arithmetic.FINE_CHANGE:
            weights = replace(self._layer(layer, Arithmetic.CHANGE), arithmetic=arithmetic)
            for index, (_, module) in enumerate(self._parts[layer].projections):
                projection = weights.projections[index]
                fine = replace(projection, weight=projection.weight.finer(module.weight))
                weights = weights.with_projection(index, fine)
            return weights
        if self._origin is None:
            return _packed(self._parts[layer], arithmetic)
        weights = self._origin._layer(layer, arithmetic)
        for path, treatment in self.treatments.get(layer, {}).items():
            component, index = self._place_of(layer, path)
            weight = PackedMatrix.pack(compressed_weight(component, treatment), arithmetic)
            weights = weights.with_projection(index, replace(weights.projections[index], weight=weight))
        return weights

    def _place_of(self, layer: int, path: str) -> tuple[Component, int]:
        component = self.decoder.component(path)
        return component, [name for name, _ in self._parts[layer].projections].index(component.name)

    def _keeps(self, arithmetic: Arithmetic) -> bool:
        """Whether the layers packed for it stay: for the fastest, and float32 where it settles all doubts."""
        return arithmetic == self.arithmetic or (self.finer == (arithmetic,) and self._has_second_copy)

    def _is_known(self, path: str, treatments: Configuration) -> bool:
        component = self.decoder.component(path)
        names = [name for name, _ in self._parts[component.layer].projections]
        return component.name in names and not treatments[path].treats_input

    def _treated(
        self, layer: int, treatments: Configuration, arithmetic: Arithmetic, from_base: bool
    ) -> DecoderLayer:
        weights = self._layer(layer, arithmetic)
        indices = []
        for component, index, own, its in self._differing(layer, treatments):
            weight, change = self._weights.packed(component, own, arithmetic, its)
            projection = replace(weights.projections[index], weight=weight, change=change)
            weights = weights.with_projection(index, projection)
            indices.append(index)
        if from_base and layer in self._inner and indices:
            weights = replace(weights, start=weights.start_of(min(indices)))
        return weights

    def _differing(
        self, layer: int, treatments: Configuration
    ) -> Iterator[tuple[Component, int, Treatment | None, Treatment | None]]:
        """The components that are treated otherwise than in the base, their projections, and what is done in either."""
        base = self.treatments.get(layer, {})
        for path in dict.fromkeys((*base, *treatments)):
            own, its = treatments.get(path), base.get(path)
            if own is None or its is None or own.key != its.key:
                yield *self._place_of(layer, path), own, its

    def _run_model(
        self,
        layer: int,
        treatments: Configuration,
        x: Tensor | None,
        arithmetic: Arithmetic,
        rows: Sequence[int],
    ) -> Tensor:
        """By transformers' own layer, on all probes and positions."""
        assert list(rows) == list(range(self.count))
        assert x is None or x.shape[1] == self.positions
        base = self.base(layer, rows)
        state = base if x is None else base + x if arithmetic.is_change else x
        out = self._model_layers.advance_whole(state, layer, treatments)
        return out - self.base(layer + 1, rows) if arithmetic.is_change else out


def checked_parts(decoder: Decoder, tokens: Tensor) -> list[LayerParts]:
    """The parts of every layer, each compared with what transformers' own layer makes of its own input.

    Args:
        decoder: of a causal language model in eval mode.
        tokens: int64 [1, T], a probe.

    Raises:
        ModelError: the layers are not of this kind, or do not compute what transformers' do, or no kernel can run;
            the message says why.
    """
    device, dtype = decoder.model.device, decoder.model.dtype
    if device.type != "cpu":
        raise ModelError(f"the model is on {device}, and the fused kernels are for the CPU")
    if dtype not in (torch.float32, torch.bfloat16):
        raise ModelError(f"the model is in {dtype}, and the fused kernels are for float32 and bfloat16")
    cpu, reason = native.load("_cpu")
    if cpu is None:
        raise ModelError(reason)
    arithmetic = _exact(decoder)
    if not has_arithmetic(arithmetic):
        raise ModelError(f"{native.cpu_isa()} has no kernel for layers in {arithmetic.name.lower()}")
    calls, states = record(decoder, tokens)
    if not has_plain_head(decoder.model, calls, tokens, states[-1]):
        raise ModelError("the model's logits are more than a product with one weight")
    found: list[LayerParts] = []
    for layer, (call, before, after) in enumerate(zip(calls, states[:-1], states[1:], strict=True)):
        parts = parts_of(call, cpu.MOST_HEAD_DIM)
        if isinstance(parts, str):
            raise ModelError(parts)
        if found and parts.shape != found[0].shape:
            raise ModelError(f"layer {layer} has other sizes than the first")
        x, expected = before.float().contiguous(), after.float()
        out, kv = (
            torch.empty_like(x),
            x.new_empty(*x.shape[:2], 2 * parts.shape.kv_heads * parts.shape.head_dim),
        )
        decoder_layer(_packed(parts, arithmetic), x, out, kv)
        deviation, added = float((out - expected).norm()), float((expected - x).norm())
        if not deviation <= _DEVIATION[arithmetic] * added:  # which may be nothing
            raise ModelError(
                f"layer {layer} is not what the fused kernel computes: "
                f"it differs by {deviation:.1g} where it adds {added:.1g}"
            )
        found.append(parts)
    return found


def _exact(decoder: Decoder) -> Arithmetic:
    return Arithmetic.BFLOAT16 if decoder.model.dtype == torch.bfloat16 else Arithmetic.FLOAT32


def _packed(parts: LayerParts, arithmetic: Arithmetic) -> DecoderLayer:
    def projection(named: tuple[str, torch.nn.Linear], first: int = 0) -> Projection:
        module = named[1]
        bias = None if module.bias is None else module.bias.detach().float().contiguous()
        return Projection(PackedMatrix.pack(module.weight, arithmetic), first, bias)

    def side_by_side(several: Sequence[tuple[str, torch.nn.Linear]]) -> tuple[Projection, ...]:
        found: list[Projection] = []
        for named in several:
            found.append(projection(named, found[-1].first + found[-1].weight.N if found else 0))
        return tuple(found)

    return DecoderLayer(
        arithmetic=arithmetic,
        shape=parts.shape,
        attention_norm=parts.attention_norm,
        mlp_norm=parts.mlp_norm,
        q_norm=parts.q_norm,
        k_norm=parts.k_norm,
        cosine=parts.cosine,
        sine=parts.sine,
        attention_in=side_by_side(parts.attention_in),
        attention_out=projection(parts.attention_out),
        mlp_in=side_by_side(parts.mlp_in),
        mlp_out=projection(parts.mlp_out),
    )
