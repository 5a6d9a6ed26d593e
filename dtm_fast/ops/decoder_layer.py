"""One layer of a decoder of Llama's kind on parts of sequences: the engine of the fast evaluator.

Not an operator of torch: it works on states that the evaluator keeps, writes into them, and has no fallback but
transformers' own layer, which computes the same (`tests/ops/test_decoder_layer.py` holds both beside each other).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dtm_fast.ops import checks, native
from dtm_fast.ops.layer_weights import DecoderLayer, LayerShape, Start

# The columns of states, as errors call them.
_COLUMNS = {
    "input": "hidden",
    "qkv": "(heads + 2 * kv_heads) * head_dim",
    "attention": "heads * head_dim",
    "mid": "hidden",
    "gate_up": "2 * intermediate",
}

# The states of the base that a layer reads in place of what it skips.
_READ_OF_BASE = {
    Start.ATTENTION: (),
    Start.ATTENTION_OUT: ("attention",),
    Start.MLP: ("mid",),
    Start.MLP_OUT: ("mid", "gate_up"),
}


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
        keep: where to write states to, [S, T, columns]; not for CHANGE, and not the input.

    Raises:
        TypeError, ValueError: an argument, or a part of the layer, is not as described, or the instruction set in use
            has no such arithmetic.
    """
    cpu, isa, threads = native.cpu_call()
    _check(layer, x, out, kv, first, first_output, base, keep)
    S, T = out.shape[:2]  # noqa: N806
    own = np.arange(S)
    of_base, of_kv = own, own
    counts: int | np.ndarray = T
    sequences = min((len(each) for each in base.tensors() if each is not None), default=S)
    if rows is not None:
        of_base = _numbers("rows", rows, S, sequences - 1, "sequences of base")
    elif sequences < S:
        raise ValueError(f"base: expected at least {S} sequences (S of out), got {sequences}")
    if kv_rows is None:
        if len(kv) < S:
            raise ValueError(f"kv: expected at least {S} sequences (S of out), got shape {list(kv.shape)}")
    else:
        of_kv = _numbers("kv_rows", kv_rows, S, len(kv) - 1, "sequences of kv")
        if len(set(of_kv.tolist())) < S:
            raise ValueError(f"kv_rows: expected each number once, got {of_kv.tolist()}")
    if lengths is not None:
        counts = _numbers("lengths", lengths, S, T, "T of out")
    if S == 0 or T == 0:
        return
    parts = np.zeros((S, 16), dtype=np.int64)
    parts[:, 0], parts[:, 1], parts[:, 2] = first, counts, first_output
    columns = (x, out, None, *base.tensors(), *keep.tensors())
    for column, tensor in enumerate(columns, start=3):
        if tensor is not None:
            is_base = 6 <= column < 11
            parts[:, column] = _addresses(tensor, of_base if is_base else own, first if is_base else 0)
    parts[:, 5] = _addresses(kv, of_kv, 0)
    cpu.decoder_layer(isa, threads, layer.native(), parts.ctypes.data, S)


def _addresses(tensor: Tensor, rows: np.ndarray, position: int) -> np.ndarray:
    return tensor.data_ptr() + 4 * (tensor.stride(0) * rows + position * tensor.stride(1))


def _numbers(name: str, values: Sequence[int], count: int, most: int, source: str) -> np.ndarray:
    """As int64, if they are `count` whole numbers from 0 to `most`, which comes from `source`."""
    found = np.asarray(values)
    if found.shape != (count,):
        raise ValueError(f"{name}: expected {count} numbers (S of out), got shape {list(found.shape)}")
    if count == 0:
        return found.astype(np.int64)
    if found.dtype.kind not in "iu":
        raise TypeError(f"{name}: expected whole numbers, got {found.dtype}")
    lowest, highest = int(found.min()), int(found.max())
    if lowest < 0 or highest > most:
        bad = lowest if lowest < 0 else highest
        raise ValueError(f"{name}: expected numbers from 0 to {most} ({source}), got {bad}")
    return found.astype(np.int64, copy=False)


def _check(
    layer: DecoderLayer,
    x: Tensor | None,
    out: Tensor,
    kv: Tensor,
    first: int,
    first_output: int,
    base: States,
    keep: States,
) -> None:
    """Raise unless all is as the kernel takes it for granted; no tensor's values are read."""
    columns, is_change = _checked_columns(layer.shape), layer.arithmetic.is_change
    hidden = layer.shape.hidden
    checks.count("first", first)
    checks.count("first_output", first_output)
    _check_states("out", out, hidden, "hidden", written=True)
    end, of_out = first + out.shape[1], out.shape[:2]
    if x is not None:
        _check_states("x", x, hidden, "hidden", of_out)
    elif not is_change and layer.start <= Start.ATTENTION_OUT:
        raise TypeError(f"x: expected a torch.Tensor, for the layer is in {layer.arithmetic.name}, got None")
    kv_columns = 2 * layer.shape.kv_heads * layer.shape.head_dim
    _check_states("kv", kv, kv_columns, "2 * kv_heads * head_dim", written=True, end=end)
    needed = _COLUMNS if is_change else _READ_OF_BASE[layer.start]
    for (name, source, width), known in zip(columns, base.tensors(), strict=True):
        if known is not None:
            _check_states(f"base.{name}", known, width, source, end=end)
        elif name in needed:
            why = f"{layer.arithmetic.name} from {layer.start.name} on"
            raise TypeError(f"base.{name}: expected a torch.Tensor, for the layer is in {why}, got None")
    for (name, source, width), kept in zip(columns, keep.tensors(), strict=True):
        if kept is None:
            continue
        if is_change or name == "input":
            why = f"the layer is in {layer.arithmetic.name}" if is_change else "it is x"
            raise ValueError(f"keep.{name}: expected None, for {why}, got a tensor")
        _check_states(f"keep.{name}", kept, width, source, of_out, written=True)
    layer.checked  # noqa: B018
    for name, angles in (("layer.cosine", layer.cosine), ("layer.sine", layer.sine)):
        if len(angles) < end:
            raise ValueError(
                f"{name}: expected at least {end} positions in dimension 0 (first + T of out), "
                f"got shape {list(angles.shape)}"
            )


@functools.cache
def _checked_columns(shape: LayerShape) -> tuple[tuple[str, str, int], ...]:
    """Raise unless the kernel can hold such a layer; of each of its states the name and the columns."""
    for name in ("hidden", "heads", "kv_heads", "head_dim", "intermediate"):
        value = getattr(shape, name)
        checks.count(f"layer.shape.{name}", value)
        if value == 0:
            raise ValueError(f"layer.shape.{name}: expected a number of at least 1, got 0")
    if shape.heads % shape.kv_heads:
        raise ValueError(
            f"layer.shape.heads: expected a multiple of kv_heads = {shape.kv_heads}, got {shape.heads}"
        )
    cpu, _, _ = native.cpu_call()
    most = cpu.MOST_HEAD_DIM
    if shape.head_dim % 2 or shape.head_dim > most:
        raise ValueError(
            f"layer.shape.head_dim: expected an even number of at most {most}, got {shape.head_dim}"
        )
    if shape.intermediate % 32:
        raise ValueError(f"layer.shape.intermediate: expected a multiple of 32, got {shape.intermediate}")
    return tuple((name, source, shape.widths[name]) for name, source in _COLUMNS.items())


def _check_states(
    name: str,
    value: object,
    columns: int,
    source: str,
    of_out: torch.Size | None = None,
    written: bool = False,
    end: int = 0,
) -> None:
    """Raise unless these are states [S, T, columns], T >= end, a sequence's contiguous; written ones do not overlap."""
    if not (
        checks.is_plain_float32(value)
        and len(value.shape) == 3
        and value.shape[2] == columns
        and (of_out is None or value.shape[:2] == of_out)
    ):
        checks.tensor(name, value, (torch.float32,))
        assert isinstance(value, Tensor)
        checks.dims(name, value, f"[S, T, {columns}]", 3)
        checks.size(name, value, 2, columns, source)
        for dim, size in enumerate(of_out or ()):
            checks.size(name, value, dim, size, f"{'ST'[dim]} of out")
        checks.on_cpu(name, value)
        if len(value) and not value[0].is_contiguous():
            strides = list(value.stride())
            raise ValueError(f"{name}: expected each sequence to be contiguous, got strides {strides}")
        if written and len(value) > 1 and value.stride(0) < value.shape[1] * columns:
            strides = list(value.stride())
            raise ValueError(f"{name}: expected sequences that do not overlap, got strides {strides}")
    if value.shape[1] < end:
        raise ValueError(
            f"{name}: expected at least {end} positions in dimension 1 (first + T of out), "
            f"got shape {list(value.shape)}"
        )
