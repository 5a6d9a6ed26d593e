"""The weights of one layer of a decoder of Llama's kind, in the order in which its kernel reads them."""

from __future__ import annotations

import enum
import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dtm_fast.ops import checks, native


class Arithmetic(enum.IntEnum):
    """How a layer is computed; states are float32 in all of them."""

    FLOAT32 = 0
    """In float32, the sums in the order of masked_linear."""
    CHANGE = 1
    """Against known states of the base: only differences are multiplied, rounded to bfloat16, and added to what the
    base has, `y' = y_base + W' (x' - x_base) + (W' - W) x_base`. States that enter and leave are differences."""
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
        """Packs a matrix [N, K] of any floating dtype on the CPU.

        Raises:
            TypeError, ValueError: it is no such matrix; or the instruction set in use has no such arithmetic.
        """
        _check_matrix(matrix)
        N, K = matrix.shape  # noqa: N806
        packed = cls(arithmetic, N, K, _panels(matrix, arithmetic))
        return packed.finer(matrix) if arithmetic == Arithmetic.FINE_CHANGE else packed

    def finer(self, matrix: Tensor) -> PackedMatrix:
        """This matrix, packed for CHANGE, for FINE_CHANGE, whose first pieces are the same."""
        if not self.arithmetic.is_change:
            raise ValueError(f"finer: expected a matrix packed for CHANGE, got {self.arithmetic.name}")
        _check_matrix(matrix)
        checks.size("matrix", matrix, 0, self.N, "N of what is packed")
        checks.size("matrix", matrix, 1, self.K, "K of what is packed")
        fine, matrix = Arithmetic.FINE_CHANGE, matrix.detach().float()
        return replace(self, arithmetic=fine, rest=_panels(matrix - matrix.bfloat16().float(), fine))

    @functools.cached_property
    def checked(self) -> bool:
        """True, or it raises what is wrong with what is packed, which is looked at once."""
        cpu, reason = native.load("_cpu")
        if cpu is None:
            raise RuntimeError(reason)
        size = cpu.packed_matrix_size(self.arithmetic, self.N, self.K)
        _check_vector("panels", self.panels, size, "as packed")
        if self.arithmetic == Arithmetic.FINE_CHANGE:
            _check_vector("rest", self.rest, size, "as packed")
        return True

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

    @functools.cached_property
    def checked(self) -> bool:
        """True, or it raises what is wrong with the weights; they are looked at once."""
        _check_layer(self)
        return True

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


def _panels(matrix: Tensor, arithmetic: Arithmetic) -> Tensor:
    cpu, isa, threads = native.cpu_call()
    N, K = matrix.shape  # noqa: N806
    matrix = matrix.detach().float().contiguous()
    size = cpu.packed_matrix_size(arithmetic, N, K)
    panels = torch.empty(size, dtype=torch.float32, device="cpu")
    cpu.pack_matrix(isa, threads, arithmetic, matrix.data_ptr(), N, K, panels.data_ptr())
    return panels


def _check_layer(layer: DecoderLayer) -> None:
    """Raise unless its weights are of its shape and arithmetic."""
    shape, arithmetic = layer.shape, layer.arithmetic
    hidden, head_dim, wide = shape.hidden, shape.head_dim, shape.intermediate
    _check_vector("layer.attention_norm", layer.attention_norm, hidden, "hidden")
    _check_vector("layer.mlp_norm", layer.mlp_norm, hidden, "hidden")
    for name, norm in (("layer.q_norm", layer.q_norm), ("layer.k_norm", layer.k_norm)):
        if norm is not None:
            _check_vector(name, norm, head_dim, "head_dim")
    for name, angles in (("layer.cosine", layer.cosine), ("layer.sine", layer.sine)):
        if not checks.is_plain_float32(angles) or len(angles.shape) != 2 or angles.shape[1] != head_dim:
            checks.tensor(name, angles, (torch.float32,))
            checks.dims(name, angles, "[positions, head_dim]", 2)
            checks.size(name, angles, 1, head_dim, "head_dim")
            checks.contiguous_on_cpu(name, angles)
    ins, outs = layer.attention_in, (layer.attention_out,)
    _check_projections("layer.attention_in", ins, arithmetic, hidden, shape.qkv, 3)
    _check_projections("layer.attention_out", outs, arithmetic, shape.heads * head_dim, hidden, 1)
    _check_projections("layer.mlp_in", layer.mlp_in, arithmetic, hidden, 2 * wide, 2)
    if len(layer.mlp_in) == 2 and layer.mlp_in[1].first != wide:
        raise ValueError(
            f"layer.mlp_in: expected {wide} columns (intermediate) of each of two, "
            f"got {layer.mlp_in[1].first} of the first"
        )
    _check_projections("layer.mlp_out", (layer.mlp_out,), arithmetic, wide, hidden, 1)


def _check_projections(
    name: str, projections: Sequence[Projection], arithmetic: Arithmetic, depth: int, columns: int, most: int
) -> None:
    """Raise unless these are at most `most` projections of `depth` columns to `columns`, side by side, without gaps."""
    end = 0
    for index, each in enumerate(projections):
        its = name if most == 1 else f"{name}[{index}]"
        N = each.weight.N  # noqa: N806
        _check_packed(its, "weight", each.weight, arithmetic, N, depth)
        if each.change is not None:
            _check_packed(its, "change", each.change, arithmetic, N, depth)
        if each.bias is not None:
            _check_vector(f"{its}.bias", each.bias, N, "N of weight")
        if each.first != end:
            raise ValueError(f"{its}.first: expected {end}, where the one before ends, got {each.first}")
        end += N
    if end != columns or len(projections) > most:
        count = "one projection" if most == 1 else f"1 to {most} projections"
        raise ValueError(
            f"{name}: expected {count} to {columns} columns, got {len(projections)} to {end} columns"
        )


def _check_packed(
    owner: str,
    name: str,
    matrix: PackedMatrix,
    arithmetic: Arithmetic,
    N: int,  # noqa: N803
    K: int,  # noqa: N803
) -> None:
    if matrix.arithmetic != arithmetic:
        raise ValueError(
            f"{owner}.{name}: expected a matrix packed for {arithmetic.name}, the layer's arithmetic, "
            f"got one for {matrix.arithmetic.name}"
        )
    if matrix.N != N or matrix.K != K:
        got = f"N = {matrix.N} and K = {matrix.K}"
        raise ValueError(f"{owner}.{name}: expected N = {N} and K = {K}, got {got}")
    try:
        matrix.checked  # noqa: B018
    except (TypeError, ValueError) as error:
        raise type(error)(f"{owner}.{name}.{error}") from None


def _check_matrix(matrix: Tensor) -> None:
    checks.tensor("matrix", matrix, (torch.float32, torch.bfloat16, torch.float16, torch.float64))
    checks.dims("matrix", matrix, "[N, K]", 2)
    checks.on_cpu("matrix", matrix)


def _check_vector(name: str, value: object, size: int, source: str) -> None:
    """Raise unless it is float32 [size], contiguous, on the CPU."""
    if not checks.is_plain_float32(value) or value.shape != (size,):
        checks.tensor(name, value, (torch.float32,))
        assert isinstance(value, Tensor)
        checks.dims(name, value, f"[{size}]", 1)
        checks.size(name, value, 0, size, source)
        checks.contiguous_on_cpu(name, value)
