"""One layer of a decoder of Llama's kind on parts of sequences: the engine of the fast evaluator.

Not an operator of torch: it works on states that the evaluator keeps, writes into them, and has no fallback but
transformers' own layer, which computes the same (`tests/ops/test_decoder_layer.py` holds both beside each other).
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from dtm_fast.ops import native


class Arithmetic(enum.IntEnum):
    """How a layer is computed; states are float32 in all of them."""

    FLOAT32 = 0
    """In float32, the sums in the order of masked_linear."""
    CHANGE = 1
    """Against known states of the base: only differences are multiplied, rounded to bfloat16, and added to what the
    base has, `y' = y_base + W (x' - x_base) + (W' - W) x_base`. States that enter and leave are differences."""
    BFLOAT16 = 2
    """As a model in bfloat16: products summed in float32, every result rounded where transformers stores it."""
    FINE_CHANGE = 3
    """CHANGE with differences and weights of 16 bits, each a sum of two numbers of bfloat16; AMX only."""

    @property
    def is_change(self) -> bool:
        """Whether states that enter and leave are differences to the base's."""
        return self in (Arithmetic.CHANGE, Arithmetic.FINE_CHANGE)


class Start(enum.IntEnum):
    """The first thing of a layer that differs from the base; what comes before is taken from the base's states."""

    ATTENTION = 0
    ATTENTION_OUT = 1
    MLP = 2
    MLP_OUT = 3


def has_arithmetic(arithmetic: Arithmetic) -> bool:
    """Whether the instruction set in use has a kernel for it."""
    isa = native.cpu_isa()
    cpu, _ = native.load("_cpu")
    return (
        cpu is not None
        and isa != "reference"
        and cpu.has_layer_arithmetic(native.ISAS.index(isa), arithmetic)
    )


@dataclass(frozen=True, eq=False)
class PackedMatrix:
    """A matrix [N, K] in the order in which an arithmetic reads it."""

    arithmetic: Arithmetic
    N: int
    K: int
    panels: Tensor
    """FLOAT32: float32; otherwise pairs of bfloat16 in the bits of each."""

    rest: Tensor | None = None
    """FINE_CHANGE: what the panels lost, packed likewise."""

    @classmethod
    def pack(cls, matrix: Tensor, arithmetic: Arithmetic) -> PackedMatrix:
        """Packs a matrix [N, K] of any floating dtype on the CPU."""
        N, K = matrix.shape  # noqa: N806
        packed = cls(arithmetic, N, K, _panels(matrix, arithmetic))
        return packed.finer(matrix) if arithmetic == Arithmetic.FINE_CHANGE else packed

    def finer(self, matrix: Tensor) -> PackedMatrix:
        """This matrix, packed for CHANGE, for FINE_CHANGE, whose first pieces are the same."""
        fine, matrix = Arithmetic.FINE_CHANGE, matrix.detach().float()
        return replace(self, arithmetic=fine, rest=_panels(matrix - matrix.bfloat16().float(), fine))

    @property
    def nbytes(self) -> int:
        """Of all that is packed."""
        return self.panels.nbytes + (0 if self.rest is None else self.rest.nbytes)


@dataclass(frozen=True, eq=False)
class Projection:
    """`y[:, first : first + N] = x @ weight.T + bias`."""

    weight: PackedMatrix
    first: int = 0
    bias: Tensor | None = None
    """float32 [N]."""
    change: PackedMatrix | None = None
    """CHANGE: what the weight is more than the base's; None if it is the base's."""

    def native(self) -> object:
        """As _cpu takes it."""
        cpu, _ = native.load("_cpu")
        assert cpu is not None
        return cpu.Projection(
            panels=self.weight.panels.data_ptr(),
            change=0 if self.change is None else self.change.panels.data_ptr(),
            panels_rest=native.address(self.weight.rest),
            change_rest=0 if self.change is None else native.address(self.change.rest),
            bias=native.address(self.bias),
            N=self.weight.N,
            first=self.first,
        )


@dataclass(frozen=True)
class LayerShape:
    """The sizes and numbers of a layer."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    eps: float
    attention_scale: float

    @property
    def qkv(self) -> int:
        """Columns of queries, keys and values together."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    @property
    def widths(self) -> dict[str, int]:
        """The columns of each of the states of a layer (States)."""
        return {
            "input": self.hidden,
            "qkv": self.qkv,
            "attention": self.heads * self.head_dim,
            "mid": self.hidden,
            "gate_up": 2 * self.intermediate,
        }


@dataclass(frozen=True, eq=False)
class DecoderLayer:
    """The weights of a layer; vectors are float32."""

    arithmetic: Arithmetic
    shape: LayerShape
    attention_norm: Tensor
    mlp_norm: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    cosine: Tensor
    """[positions, head_dim], as transformers makes them; sine likewise."""
    sine: Tensor
    attention_in: tuple[Projection, ...]
    """Columns: queries, keys, values."""
    attention_out: Projection
    mlp_in: tuple[Projection, ...]
    """Columns: gate, up."""
    mlp_out: Projection
    start: Start = Start.ATTENTION

    def with_projection(self, index: int, projection: Projection) -> DecoderLayer:
        """With another projection in place of number `index` of `projections`."""
        all_of_them = list(self.projections)
        all_of_them[index] = projection
        ins = len(self.attention_in)
        return replace(
            self,
            attention_in=tuple(all_of_them[:ins]),
            attention_out=all_of_them[ins],
            mlp_in=tuple(all_of_them[ins + 1 : -1]),
            mlp_out=all_of_them[-1],
        )

    @property
    def projections(self) -> tuple[Projection, ...]:
        """All, in the order in which they run."""
        return (*self.attention_in, self.attention_out, *self.mlp_in, self.mlp_out)

    def start_of(self, index: int) -> Start:
        """Where the layer starts to differ if number `index` of `projections` is the first that does."""
        ins = len(self.attention_in)
        if index < ins:
            return Start.ATTENTION
        if index == ins:
            return Start.ATTENTION_OUT
        return Start.MLP if index < len(self.projections) - 1 else Start.MLP_OUT

    def native(self) -> object:
        """As _cpu takes it."""
        cpu, _ = native.load("_cpu")
        assert cpu is not None
        shape = self.shape
        return cpu.DecoderLayer(
            arithmetic=self.arithmetic,
            start=self.start,
            hidden=shape.hidden,
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            intermediate=shape.intermediate,
            eps=shape.eps,
            attention_scale=shape.attention_scale,
            attention_norm=self.attention_norm.data_ptr(),
            mlp_norm=self.mlp_norm.data_ptr(),
            q_norm=native.address(self.q_norm),
            k_norm=native.address(self.k_norm),
            cosine=self.cosine.data_ptr(),
            sine=self.sine.data_ptr(),
            attention_in=[each.native() for each in self.attention_in],
            attention_out=self.attention_out.native(),
            mlp_in=[each.native() for each in self.mlp_in],
            mlp_out=self.mlp_out.native(),
        )


@dataclass(frozen=True, eq=False)
class States:
    """What a layer computes on the way, for sequences of equal length: each [S, T, columns] float32, or None."""

    input: Tensor | None = None
    """hidden columns: the residual stream."""
    qkv: Tensor | None = None
    """Before the norms of heads and the rotation."""
    attention: Tensor | None = None
    """heads * head_dim: what the last projection of the attention multiplies."""
    mid: Tensor | None = None
    """hidden: the residual stream after the attention."""
    gate_up: Tensor | None = None
    """2 * intermediate."""

    def tensors(self) -> tuple[Tensor | None, ...]:
        """In the order of _cpu."""
        return (self.input, self.qkv, self.attention, self.mid, self.gate_up)

    @property
    def nbytes(self) -> int:
        """Of all that are there."""
        return sum(each.nbytes for each in self.tensors() if each is not None)


def new_states(shape: LayerShape, sequences: int, positions: int) -> States:
    """Room for all states but the input, each float32 [sequences, positions, columns], holding nothing of use.

    One block of memory: above 32 MiB its pages come at once, large ones where Linux grants them, for the states of a
    model's layers are too much for what maps single pages.
    """
    cpu, _, threads = native.cpu_call()
    sizes = {name: sequences * positions * n for name, n in shape.widths.items() if name != "input"}
    room = torch.empty(sum(sizes.values()), dtype=torch.float32, device="cpu")
    cpu.populate_large_pages(threads, room.data_ptr(), room.nbytes)
    parts = zip(sizes, room.split(list(sizes.values())), strict=True)
    return States(**{name: part.view(sequences, positions, shape.widths[name]) for name, part in parts})


def decoder_layer(
    layer: DecoderLayer,
    x: Tensor | None,
    out: Tensor,
    kv: Tensor,
    *,
    first: int = 0,
    first_output: int = 0,
    lengths: Sequence[int] | None = None,
    rows: Sequence[int] | None = None,
    kv_rows: Sequence[int] | None = None,
    base: States = States(),
    keep: States = States(),
) -> None:
    """Runs a layer on positions `first .. first + T - 1` of S sequences.

    A row's bits depend on neither the other sequences, the threads, nor on how its positions are cut into calls.

    Args:
        layer: its weights.
        x: [S, T, hidden] float32, contiguous; CHANGE: the difference to the base's, None where there is none.
        out: [S, T, hidden], written; positions before first_output hold nothing of use.
        kv: [E, C, 2 * kv_heads * head_dim], C >= first + T: keys and values; earlier positions are read, these
            written.
        first: the first position.
        first_output: outputs are wanted from this position on.
        lengths: how many positions each sequence has, at most T; by default T.
        rows: which sequences of `base` these are; by default all, in order.
        kv_rows: which sequences of `kv` these are, each once; by default the first S, in order.
        base: states of the base, [B, C, columns]: what `layer.start` skips; for CHANGE all.
        keep: where to write states to, [S, T, columns]; not for CHANGE.
    """
    cpu, isa, threads = native.cpu_call()
    S, T = out.shape[:2]  # noqa: N806
    if S == 0 or T == 0:
        return
    own = np.arange(S)
    of_base = own if rows is None else np.asarray(rows)
    parts = np.zeros((S, 16), dtype=np.int64)
    parts[:, 0], parts[:, 1], parts[:, 2] = first, T if lengths is None else lengths, first_output
    columns = (x, out, None, *base.tensors(), *keep.tensors())
    for column, tensor in enumerate(columns, start=3):
        if tensor is not None:
            is_base = 6 <= column < 11
            parts[:, column] = _addresses(tensor, of_base if is_base else own, first if is_base else 0)
    parts[:, 5] = _addresses(kv, own if kv_rows is None else np.asarray(kv_rows), 0)
    cpu.decoder_layer(isa, threads, layer.native(), parts.ctypes.data, S)


def _panels(matrix: Tensor, arithmetic: Arithmetic) -> Tensor:
    cpu, isa, threads = native.cpu_call()
    N, K = matrix.shape  # noqa: N806
    matrix = matrix.detach().float().contiguous()
    panels = torch.empty(cpu.packed_matrix_size(arithmetic, N, K), dtype=torch.float32, device="cpu")
    cpu.pack_matrix(isa, threads, arithmetic, matrix.data_ptr(), N, K, panels.data_ptr())
    return panels


def _addresses(tensor: Tensor, rows: np.ndarray, position: int) -> np.ndarray:
    assert tensor.dtype == torch.float32, "states are float32"
    assert tensor.stride()[1:] == (tensor.shape[2], 1), "a sequence's states are contiguous"
    return tensor.data_ptr() + 4 * (tensor.stride(0) * rows + position * tensor.stride(1))
