"""The layers of a decoder of Llama's kind on parts of the probes and of the text: the fast path on a GPU."""

import copy
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dtm_fast.compression import Configuration, compressed_weight, key_of
from dtm_fast.measure.compressed_weights import relative_change
from dtm_fast.measure.device_change import BaseStates, TreatedWeight, base_states, run_change
from dtm_fast.measure.device_layer import DeviceLayer, KeysAndValues, moved
from dtm_fast.measure.device_rows import has_triton
from dtm_fast.measure.layer_graphs import CudaGraphs, LayerGraphs
from dtm_fast.measure.model_layers import ModelLayers
from dtm_fast.measure.prefix_tree import first_difference, layers_of
from dtm_fast.measure.tensor_store import TensorStore
from dtm_fast.model import Decoder
from dtm_fast.ops.layer_weights import Arithmetic

# A part reads every weight anew and launches every kernel anew. On an H200 one part was the fastest on the shape of
# Llama 2 7B, for changes small and large (docs/gpu.md). Who may drop a configuration wants to know early, though.
_ONE_SHARE = (1.0,)
_SHARES_WITH_REFEREE = (0.1, 1.0)
# Seconds: a layer whose products take less ends before its kernels are launched.
_LAUNCHES = 600e-6
_RATES = {torch.bfloat16: 4e14, torch.float32: 4e13}  # operations a second

_KEPT = 2**28  # bytes of compressed weights, or a quarter of what states may take


class DeviceLayers:
    """Runs layers on some of the probes and some of their positions, in the model's dtype.

    As ``FusedLayers``, but a state is in the model's dtype, and a product rounds by its shape. So configurations share
    no states but the base's, that what is measured beside a configuration changes none of its bits.

    Args:
        layers: from ``device_layers_of``.
        model_layers: the same layers by transformers, with the base's states.
        memory: bytes that the base's states may take; of compressed weights a quarter of that is kept.
        shares: in which parts to read a completion; by default in one, or two where a referee may stop.
        by_differences: whether the fastest arithmetic is ``Arithmetic.CHANGE``, of a float32 model; ``memory`` then
            holds the base's states within the layers too, those of the last layers first, and a layer without them is
            computed exactly.
    """

    shares_parts = False

    def __init__(
        self,
        layers: list[DeviceLayer],
        model_layers: ModelLayers,
        memory: int = 0,
        shares: Sequence[float] | None = None,
        by_differences: bool = False,
    ) -> None:
        """Computes nothing yet, but by differences the base's states."""
        probes, model = model_layers.probes, model_layers.decoder.model
        self.decoder: Decoder = model_layers.decoder
        self.depth = len(layers)
        self.count = len(probes)
        self.positions = probes.tokens.shape[1] - 1  # nothing follows the last token
        self.shape = layers[0].parts.shape
        self.exact = Arithmetic.BFLOAT16 if model.dtype == torch.bfloat16 else Arithmetic.FLOAT32
        self.treatments: Mapping[int, Configuration] = {}
        self._layers = layers
        self._model_layers = model_layers
        self._by_differences = by_differences
        self._shares = tuple(shares) if shares else None
        self._weights = _Weights(self.decoder, max(_KEPT, memory // 4))
        self._rounded: dict[str, Tensor] = {}
        self._changes: dict[tuple[str, ...], float] = {}
        self._inner: dict[int, BaseStates] = {}
        self._paths = {path for layer in layers for path in layer.paths}
        self._earlier: dict[int, tuple[list[int], KeysAndValues]] = {}
        self._whole: tuple[int, Tensor] | None = None
        self._origin: DeviceLayers | None = None
        self._own = TensorStore()
        self._norm: Any = model.base_model.norm
        self._launches_dominate = self._seconds_of_a_layer() < _LAUNCHES
        recorded = self._launches_dominate and model.device.type == "cuda" and not by_differences
        self._graphs = LayerGraphs(layers, CudaGraphs(model.device)) if recorded else None
        if by_differences:
            assert self.exact == Arithmetic.FLOAT32
            self._record(memory)

    @property
    def engine(self) -> str:
        """What runs, in a few words."""
        kernels = " and Triton" if has_triton(self.decoder.model.device) else ""
        how = "" if self._graphs is None else ", in CUDA graphs"
        return f"layers in parts by torch{kernels}, {self.arithmetic.name.lower()}{how}"

    def rebased(
        self, configuration: Configuration, memory: int | None = None, rooms: Sequence[Any] = ()
    ) -> "DeviceLayers":
        """The same layers on the states of a configuration that ``can_run_in_parts``; ``rooms`` are not used."""
        assert self._origin is None
        assert self.can_run_in_parts(configuration)
        other = copy.copy(self)
        other._origin = self
        other.treatments = layers_of(self.decoder, configuration)
        other._own, other._whole, other._inner = TensorStore(memory), None, {}
        other._record(memory)
        return other

    def states_given_up(self) -> list[Any]:
        """Lets go of its states; it cannot run any more."""
        self._own, self._whole, self._inner = TensorStore(), None, {}
        return []

    @property
    def of_the_model(self) -> "DeviceLayers":
        """Those on the model's own states."""
        return self._origin or self

    @property
    def arithmetic(self) -> Arithmetic:
        """The fastest one."""
        return Arithmetic.CHANGE if self._by_differences else self.exact

    @property
    def finer(self) -> tuple[Arithmetic, ...]:
        """What settles doubts that differences leave."""
        return (self.exact,)

    def shares(self, has_referee: bool) -> Sequence[float]:
        """In which parts to read a completion."""
        if self._shares is not None:
            return self._shares
        return _SHARES_WITH_REFEREE if has_referee and not self._launches_dominate else _ONE_SHARE

    def base(self, layer: int, rows: Sequence[int], first: int = 0, end: int | None = None) -> Tensor:
        """The base's residual stream before ``layer``, [R, T, hidden]."""
        state = self._entering(layer)[:, first:end]
        if list(rows) == list(range(self.count)):
            return state.contiguous()
        return state[torch.tensor(list(rows), device=state.device)]

    def can_run_in_parts(self, treatments: Configuration) -> bool:
        """Whether a layer with these treatments can be run on some of the positions."""
        return all(
            path in self._paths and not treatment.treats_input for path, treatment in treatments.items()
        )

    @torch.no_grad()
    def largest_change(self, by_layer: Mapping[int, Configuration]) -> float:
        """As ``PartLayers.largest_change``."""
        found = [0.0]
        for layer in {**self.treatments, **by_layer}:
            own = by_layer.get(layer, {})
            for _, path in self._differing(layer, own):
                key = (path, *(key_of(each.get(path)) for each in (own, self.treatments.get(layer, {}))))
                if key not in self._changes:
                    base = self._weight_of(path, self.treatments.get(layer, {}))
                    self._changes[key] = relative_change(self._weight_of(path, own) - base, base)
                found.append(self._changes[key])
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
        """The state after a layer; positions before first_output hold nothing of use.

        Args:
            layer: its number.
            treatments: of its components.
            x: the state before it, for positions first .. end - 1.
            arithmetic: the fastest or the exact one.
            rows: which probes these are.
            first: the first position. Those before it are what this layer was run on last, with the same treatments
                here and below, for at least these rows.
            end: behind the last position.
            first_output: of positions before this one only keys and values are wanted.
            lengths: not looked at: all rows are run to the end.
            kv: not None where nothing is to be known of this run afterwards; then ``first`` is 0.
        """
        rows, end = list(rows), self.positions if end is None else end
        if arithmetic.is_change:
            return self._run_change(layer, treatments, x, rows, first, end, max(0, first_output - first))
        if x is None:
            x = self.base(layer, rows, first, end)
        if not self.can_run_in_parts(treatments):
            assert rows == list(range(self.count))
            assert x.shape[1] == self.positions
            return self._model_layers.advance_whole(x, layer, treatments)
        skip = max(0, first_output - first)
        if kv is not None:
            weights = {path: self._weights.of(path, treatments) for path in treatments}
            return self._layers[layer].run(x, weights, None, skip)[0]
        if self._graphs is not None and not treatments and first == 0 and end == self.positions:
            self._earlier.pop(layer, None)
            return self._graphs.run(layer, x, skip)
        weights = {path: self._weights.of(path, treatments) for path in treatments}
        earlier = self._earlier_of(layer, rows) if first > 0 else None
        self._earlier.pop(layer, None)
        out, known = self._layers[layer].run(x, weights, earlier, skip)
        if end < self.positions:  # or nothing follows
            self._earlier[layer] = rows, known
        return out

    def head_input(
        self, state: Tensor | None, arithmetic: Arithmetic, rows: Sequence[int], first: int, end: int
    ) -> Tensor:
        """What the head multiplies: the final norm of a state of positions first .. end - 1."""
        if state is None or arithmetic.is_change:
            base = self.base(self.depth, rows, first, end)
            state = base if state is None else base + state
        return self._norm(state)  # type: ignore[no-any-return]

    def new_kv(self, rows: int) -> Tensor:
        """Nothing, for keys and values of layers that are run once are kept nowhere."""
        return torch.empty(0)

    @torch.no_grad()
    def _run_change(
        self,
        layer: int,
        treatments: Configuration,
        change: Tensor | None,
        rows: list[int],
        first: int,
        end: int,
        skip: int,
    ) -> Tensor:
        """The difference behind a layer from that before it."""
        x = self.base(layer, rows, first, end)
        if layer not in self._inner:
            state = x if change is None else x + change
            out = self.run(layer, treatments, state, self.exact, rows, first, end, first + skip)
            return out - self.base(layer + 1, rows, first, end)
        own, paths = self._layers[layer], self._layers[layer].paths
        base = self.treatments.get(layer, {})
        treated = {}
        for index, path in self._differing(layer, treatments):
            weight = self._weight_of(path, treatments)
            difference = (weight - self._weight_of(path, base)).bfloat16()
            treated[index] = TreatedWeight(weight.bfloat16(), difference)
        earlier = self._earlier_of(layer, rows) if first > 0 and layer in self._earlier else None
        self._earlier.pop(layer, None)
        rounded = [self._rounded_weight(path, base) for path in paths]
        out, known = run_change(
            own, x, self._inner[layer].of(rows, first, end), change, rounded, treated, earlier, skip
        )
        if end < self.positions and known is not None:
            self._earlier[layer] = rows, known
        return out

    def _differing(self, layer: int, treatments: Configuration) -> Iterator[tuple[int, str]]:
        """The projections that are treated otherwise than in the base, and their paths."""
        base = self.treatments.get(layer, {})
        for index, path in enumerate(self._layers[layer].paths):
            if key_of(treatments.get(path)) != key_of(base.get(path)):
                yield index, path

    def _weight_of(self, path: str, treatments: Configuration) -> Tensor:
        if path in treatments:
            return self._weights.of(path, treatments)
        return self.decoder.component(path).weight

    def _rounded_weight(self, path: str, base: Configuration) -> Tensor:
        """That of the base in bfloat16."""
        if path in base:
            return self._weight_of(path, base).bfloat16()
        if path not in self._rounded:
            self._rounded[path] = self.decoder.component(path).weight.detach().bfloat16()
        return self._rounded[path]

    @torch.no_grad()
    def base_by_itself(self, prefix: int) -> Tensor:
        """The base's ``head_input`` [P, N, hidden] as these layers compute it, in the parts in which they read."""
        everyone, found, first = range(self.count), [], 0
        for share in self.shares(has_referee=False):
            end = prefix - 1 + int((self.positions + 1 - prefix) * share)
            if end <= first:
                continue
            x = self.base(0, everyone, first, end)
            for layer in range(self.depth):
                x = self.run(layer, {}, x, self.exact, everyone, first, end)
            wanted = max(first, prefix - 1)
            found.append(self.head_input(x[:, wanted - first :], self.exact, everyone, wanted, end))
            first = end
        return torch.cat(found, dim=1)

    def _earlier_of(self, layer: int, rows: list[int]) -> KeysAndValues:
        known, earlier = self._earlier[layer]
        if known == rows:
            return earlier
        place = {row: index for index, row in enumerate(known)}
        return moved(earlier, [place[row] for row in rows])

    def _entering(self, layer: int) -> Tensor:
        """The base's state of all probes, [P, positions, hidden]; the last one asked for is at hand."""
        if self._whole is None or self._whole[0] != layer:
            self._whole = None  # before there is another
            known = layer in self._own
            self._whole = layer, self._own[layer] if known else self._model_layers.entering(layer)
        return self._whole[1][:, : self.positions]

    @torch.no_grad()
    def _record(self, memory: int | None) -> None:
        """The states of a base that is a configuration, and by differences those within the layers of any base."""
        start = first_difference(self.treatments, {}, self.depth)
        hidden, row = self.shape.hidden, 4 * self.count  # bytes of a position in one column of a state
        size = row * self.positions * (sum(self.shape.widths.values()) - hidden)
        # The model's states between the layers have the last token, too.
        between = (self.depth + 1) * row * (self.positions + 1) * hidden
        left = None if memory is None else max(0, memory - between)
        kept = self.depth if left is None else min(self.depth, left // size)
        x: Tensor | None = None
        for layer in range(self.depth):
            treatments = self.treatments.get(layer, {})
            if self._by_differences and layer >= self.depth - kept:
                before = self.base(layer, range(self.count)) if x is None else x
                weights = {path: self._weights.of(path, treatments) for path in treatments}
                self._inner[layer], after = base_states(self._layers[layer], before, weights)
            elif layer >= start:
                after = self.run(layer, treatments, x, self.exact, range(self.count))
            if layer >= start:
                x = after
                self._own.put(layer + 1, x)

    def _seconds_of_a_layer(self) -> float:
        """What its products take, about."""
        weights = sum(module.weight.numel() for _, module in self._layers[0].parts.projections)
        of_products = torch.bfloat16 if self._by_differences else self.decoder.model.dtype
        return 2 * weights * self.count * self.positions / _RATES[of_products]


class _Weights:
    """Compressed weights; the ones used last are kept.

    Args:
        decoder: whose.
        bound: bytes of them to keep at most.
    """

    def __init__(self, decoder: Decoder, bound: int) -> None:
        self._decoder = decoder
        self._bound = bound
        self._size = 0
        self._known: OrderedDict[tuple[str, str], Tensor] = OrderedDict()

    @torch.no_grad()
    def of(self, path: str, treatments: Configuration) -> Tensor:
        """What the treatment of a component makes of its weight."""
        key = (path, treatments[path].key)
        if key in self._known:
            self._known.move_to_end(key)
            return self._known[key]
        weight = compressed_weight(self._decoder.component(path), treatments[path])
        self._known[key] = weight
        self._size += weight.nbytes
        while self._size > self._bound and len(self._known) > 1:
            self._size -= self._known.popitem(last=False)[1].nbytes
        return weight
