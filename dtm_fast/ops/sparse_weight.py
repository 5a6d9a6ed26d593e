"""A weight of which only the kept entries are stored: packing, checking, unpacking."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from dtm_fast.ops import backends, checks, large_pages, native
from dtm_fast.ops.mask_bits import check_packed, pack_mask, unpack_mask_reference

BLOCK = 127
"""Columns of a block. Column 127 of every block is the padding's: it stands for x = 0."""
LANES = 16
"""Rows of a group."""
MOST_PANEL_ROWS = 512
WORD = 4
"""Columns of a row that lie side by side."""


class Layout(NamedTuple):
    """How a weight [N, K] is cut: `panels` of `rows` rows, each in `blocks` of BLOCK columns."""

    panels: int
    rows: int
    blocks: int

    @property
    def groups(self) -> int:
        """Groups of LANES rows in a panel."""
        return self.rows // LANES


def layout(N: int, K: int) -> Layout:  # noqa: N803
    """Panels of equal size, as few as possible, each a multiple of LANES rows and at most MOST_PANEL_ROWS."""
    panels = -(-N // MOST_PANEL_ROWS)
    rows = -(-N // (max(panels, 1) * LANES)) * LANES
    return Layout(panels, rows, -(-K // BLOCK))


@dataclass(frozen=True, eq=False)
class SparseWeight:
    """The kept entries of a weight [N, K], in the order in which sparse_linear reads them.

    The weight is cut into panels of R rows (a multiple of 16, at most 512) and blocks of 127 columns. Within
    a block of a panel the rows are sorted by their number of kept entries, descending, and taken in groups of
    16, so that the rows of a group have nearly equally many. Step s of a group is the s-th kept entry of each
    of its rows, in ascending order of the columns; rows that have fewer are padded with value 0 at column
    127. Groups follow each other, blocks of a panel follow each other, panels follow each other.

    Attributes:
        values: [S, 16] float32, one line per step.
        columns: [C, 16, 4] uint8, the column within the block; every four steps of a group begin a new line.
        rows: [P, B, R] int16, the row within the panel, for each place after sorting; R beyond row N.
        steps: [P, B, R / 16] uint8, the steps of each group.
        N: the number of rows.
        K: the number of columns.

    Raises (when made from tensors):
        TypeError: a tensor has another dtype.
        ValueError: shapes, devices or contents do not fit together.

    Source: the sorted groups are those of SELL-C-sigma (Kreutzer et al. 2014), here within blocks of columns.
    """

    values: torch.Tensor
    columns: torch.Tensor
    rows: torch.Tensor
    steps: torch.Tensor
    N: int
    K: int

    def __post_init__(self) -> None:
        """Check everything."""
        check_shapes(self.values, self.columns, self.rows, self.steps, self.N, self.K)
        _check_contents(self)

    @classmethod
    def pack(
        cls, weight: torch.Tensor, mask: torch.Tensor | None = None, *, backend: str | None = None
    ) -> SparseWeight:
        """Pack the entries of a weight that a mask keeps.

        Args:
            weight: [N, K], float32 or bfloat16.
            mask: [N, ceil(K / 8)] uint8, as pack_mask makes it; None keeps what is not 0.
            backend: None (the best), "cpu" or "reference". All give the same bits.

        Raises:
            TypeError: an argument is no dense tensor of such a dtype.
            ValueError: shapes or devices do not fit, mask has bits set beyond K; backend is unknown.
            RuntimeError: backend cannot run.
        """
        checks.tensor("weight", weight, (torch.float32, torch.bfloat16))
        checks.dims("weight", weight, "[N, K]", 2)
        chosen = backends.choose("pack_sparse", backend, weight.device)
        weight = weight.detach()
        if mask is None:
            mask = pack_mask(weight != 0, backend=backend)
        check_packed("mask", mask, weight.shape[1])
        checks.dims("mask", mask, "[N, ceil(K / 8)]", 2)
        checks.size("mask", mask, 0, weight.shape[0], "N of weight")
        checks.same_device("weight", weight, mask=mask)
        checks.padding_bits_zero("mask", mask, weight.shape[1])
        packed = (_pack_cpu if chosen == "cpu" else pack_sparse_reference)(weight, mask)
        return _trusted(*packed, *weight.shape)

    @classmethod
    def empty(cls, N: int, K: int, device: torch.device | str | None = None) -> SparseWeight:  # noqa: N803
        """A weight [N, K] of which nothing is kept."""
        checks.count("N", N)
        checks.count("K", K)
        cut = layout(N, K)
        places = torch.arange(cut.rows, device=device)
        real = N - torch.arange(cut.panels, device=device) * cut.rows
        rows = torch.where(places < real[:, None], places, cut.rows).to(torch.int16)
        return _trusted(
            torch.zeros((0, LANES), device=device, dtype=torch.float32),
            torch.zeros((0, LANES, WORD), device=device, dtype=torch.uint8),
            rows[:, None].repeat(1, cut.blocks, 1),
            torch.zeros((cut.panels, cut.blocks, cut.groups), device=device, dtype=torch.uint8),
            N,
            K,
        )

    @property
    def nnz(self) -> int:
        """How many entries are kept."""
        return int(_is_entry(self.columns, self.steps).sum())

    @property
    def density(self) -> float:
        """The share of the entries that is kept; 0 for an empty weight."""
        return self.nnz / max(self.N * self.K, 1)

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors."""
        return sum(each.nbytes for each in (self.values, self.columns, self.rows, self.steps))

    def to_dense(self) -> torch.Tensor:
        """The weight [N, K] in float32, with 0 where nothing is kept."""
        n, k, value = entries(self.values, self.columns, self.rows, self.steps, self.N, self.K)
        dense = self.values.new_zeros((self.N, self.K))
        return dense.index_put((n, k), value)


def _trusted(*fields: Any) -> SparseWeight:
    """A SparseWeight of tensors that packing has just made, and that need no check."""
    weight = object.__new__(SparseWeight)
    for name, value in zip(SparseWeight.__dataclass_fields__, fields, strict=True):
        object.__setattr__(weight, name, value)
    return weight


def _pack_cpu(weight: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
    cpu, _, threads = native.cpu_call()
    (N, K), cut = weight.shape, layout(*weight.shape)  # noqa: N806
    weight, mask = native.as_rows(weight), native.as_rows(mask)
    order_of_rows = mask.new_empty((cut.panels, cut.blocks, cut.rows), dtype=torch.int16)
    order_of_steps = mask.new_empty((cut.panels, cut.blocks, cut.groups), dtype=torch.uint8)
    kept = (mask.data_ptr(), mask.stride(0), N, K)
    cpu.sparse_order(threads, *kept, order_of_rows.data_ptr(), order_of_steps.data_ptr())
    values, columns, rows, steps = large_pages.empty(
        ((int(order_of_steps.sum()), LANES), torch.float32),
        ((int(_words(order_of_steps).sum()), LANES, WORD), torch.uint8),
        (order_of_rows.shape, torch.int16),
        (order_of_steps.shape, torch.uint8),
    )
    rows.copy_(order_of_rows)
    steps.copy_(order_of_steps)
    cpu.sparse_pack(
        threads,
        native.FLOAT_TYPES[weight.dtype],
        weight.data_ptr(),
        weight.stride(0),
        *kept,
        rows.data_ptr(),
        steps.data_ptr(),
        values.data_ptr(),
        columns.data_ptr(),
    )
    return values, columns, rows, steps


def _words(steps: torch.Tensor) -> torch.Tensor:
    """How many lines of columns each group has."""
    return (steps.long() + WORD - 1) // WORD


def pack_sparse_reference(weight: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The reference twin of packing: values, columns, rows, steps."""
    (N, K), cut = weight.shape, layout(*weight.shape)  # noqa: N806
    kept = unpack_mask_reference(mask, K)
    panels = [
        _pack_panel(weight[first : first + cut.rows], kept[first : first + cut.rows], cut)
        for first in range(0, N, max(cut.rows, 1))
    ]
    none = (
        weight.new_empty((0, LANES), dtype=torch.float32),
        kept.new_empty((0, LANES, WORD), dtype=torch.uint8),
        kept.new_empty((0, cut.blocks, cut.rows), dtype=torch.int16),
        kept.new_empty((0, cut.blocks, cut.groups), dtype=torch.uint8),
    )
    return tuple(torch.cat(each) for each in zip(none, *panels, strict=True))


def _pack_panel(weight: torch.Tensor, kept: torch.Tensor, cut: Layout) -> tuple[torch.Tensor, ...]:
    filler = (0, cut.blocks * BLOCK - weight.shape[1], 0, cut.rows - weight.shape[0])
    shape = (cut.rows, cut.blocks, BLOCK)
    weight = F.pad(weight.float(), filler).reshape(shape).transpose(0, 1)
    kept_blocks = F.pad(kept, filler).reshape(shape).transpose(0, 1)

    counts = kept_blocks.sum(-1)
    counts[:, kept.shape[0] :] = -1  # rows beyond N come last
    order = counts.argsort(dim=1, descending=True, stable=True)
    rows = torch.where(order < kept.shape[0], order, cut.rows).to(torch.int16)
    weight = weight.gather(1, order[..., None].expand(weight.shape))
    kept_blocks = kept_blocks.gather(1, order[..., None].expand(weight.shape))
    counts = kept_blocks.sum(-1)
    steps = counts.reshape(cut.blocks, cut.groups, LANES)[..., 0]  # the first row of a group has most

    # Kept columns first, in ascending order; then padding.
    ascending = kept_blocks.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
    is_entry = torch.arange(BLOCK, device=kept.device) < counts[..., None]
    values = torch.where(is_entry, weight.gather(-1, ascending), 0)
    columns = torch.where(is_entry, ascending, BLOCK).to(torch.uint8)

    by_group = (cut.blocks, cut.groups, LANES)
    values = values.reshape(*by_group, BLOCK).transpose(2, 3)
    stored_values = values[torch.arange(BLOCK, device=kept.device) < steps[..., None]]
    words = -(-BLOCK // WORD)
    columns = F.pad(columns, (0, words * WORD - BLOCK), value=BLOCK)
    columns = columns.reshape(*by_group, words, WORD).transpose(2, 3)
    stored_columns = columns[torch.arange(words, device=kept.device) * WORD < steps[..., None]]
    return stored_values, stored_columns, rows[None], steps[None].to(torch.uint8)


def entries(
    values: torch.Tensor,
    columns: torch.Tensor,
    rows: torch.Tensor,
    steps: torch.Tensor,
    N: int,  # noqa: N803
    K: int,  # noqa: N803
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The kept entries as (n, k, value), sorted by n and then by k."""
    cut = layout(N, K)
    flat_steps = steps.flatten().long()
    group = torch.repeat_interleave(flat_steps)
    by_step = _by_step(columns, steps)
    panel, block = group // max(cut.blocks * cut.groups, 1), group // max(cut.groups, 1) % max(cut.blocks, 1)
    n = panel[:, None] * cut.rows + rows.reshape(-1, LANES).long()[group]
    k = block[:, None] * BLOCK + by_step
    is_entry = by_step < BLOCK
    n, k, value = n[is_entry], k[is_entry], values[is_entry]
    order = (n * K + k).argsort()
    return n[order], k[order], value[order]


def _by_step(columns: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """[S, 16] int64: the columns, one line per step as the values have it."""
    flat = steps.flatten().long()
    words = _words(flat)
    group = torch.repeat_interleave(flat)
    step = torch.arange(len(group), device=flat.device) - (flat.cumsum(0) - flat)[group]
    word = (words.cumsum(0) - words)[group] + step // WORD
    return columns.transpose(1, 2)[word, step % WORD].long()


def _is_entry(columns: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    return _by_step(columns, steps) < BLOCK


def check_shapes(
    values: torch.Tensor,
    columns: torch.Tensor,
    rows: torch.Tensor,
    steps: torch.Tensor,
    N: int,  # noqa: N803
    K: int,  # noqa: N803
) -> None:
    """Raise unless the tensors can be a packed weight [N, K], as far as their shapes and dtypes say."""
    checks.count("N", N)
    checks.count("K", K)
    cut = layout(N, K)
    checks.tensor("values", values, (torch.float32,))
    checks.tensor("columns", columns, (torch.uint8,))
    checks.tensor("rows", rows, (torch.int16,))
    checks.tensor("steps", steps, (torch.uint8,))
    for name, value, trailing in (("values", values, (LANES,)), ("columns", columns, (LANES, WORD))):
        if value.shape[1:] != trailing:
            lengths = ", ".join(map(str, trailing))
            raise ValueError(f"{name}: expected shape [any, {lengths}], got {list(value.shape)}")
    for name, value, shape in (
        ("rows", rows, (cut.panels, cut.blocks, cut.rows)),
        ("steps", steps, (cut.panels, cut.blocks, cut.groups)),
    ):
        if value.shape != shape:
            raise ValueError(
                f"{name}: expected shape {list(shape)} for N = {N}, K = {K}, got {list(value.shape)}"
            )
    for name, value in (("values", values), ("columns", columns), ("rows", rows), ("steps", steps)):
        if not value.is_contiguous():
            raise ValueError(f"{name}: expected a contiguous tensor, got strides {value.stride()}")
    checks.same_device("values", values, columns=columns, rows=rows, steps=steps)


def _check_contents(weight: SparseWeight) -> None:
    """Raise ValueError unless every place of the packed weight says something that packing can have said."""
    cut, steps = layout(weight.N, weight.K), weight.steps.long()
    widths = (weight.K - torch.arange(cut.blocks, device=steps.device) * BLOCK).clamp(max=BLOCK)
    if bool((steps > widths[:, None]).any()):
        raise ValueError("steps: expected at most the number of columns of the block in every group")
    for name, value, lines in (
        ("values", weight.values, int(steps.sum())),
        ("columns", weight.columns, int(_words(steps).sum())),
    ):
        checks.size(name, value, 0, lines, "the steps of all groups")
    real = (weight.N - torch.arange(cut.panels, device=steps.device) * cut.rows).clamp(0, cut.rows)
    places = torch.arange(cut.rows, device=steps.device)
    expected = torch.where(places < real[:, None], places, cut.rows)
    if not torch.equal(weight.rows.long().sort(-1).values, expected[:, None].expand(weight.rows.shape)):
        raise ValueError("rows: expected every row of the panel once in every block")
    columns = _by_step(weight.columns, weight.steps)
    group = torch.repeat_interleave(steps.flatten())
    width = widths.repeat_interleave(cut.groups).repeat(cut.panels)[group]
    if bool(((columns >= width[:, None]) & (columns != BLOCK)).any()):
        raise ValueError(f"columns: expected columns of the block, or {BLOCK} for padding")
    row = weight.rows.reshape(-1, LANES).long()[group]
    if bool(((row == cut.rows) & (columns != BLOCK)).any()):
        raise ValueError("columns: expected padding only in rows beyond N")
    after = columns[1:][group[1:] == group[:-1]]
    before = columns[:-1][group[1:] == group[:-1]]
    if bool(((after <= before) & (after != BLOCK)).any()):
        raise ValueError("columns: expected ascending columns in every row, then padding")
    if bool(((columns == BLOCK) & (weight.values != 0)).any()):
        raise ValueError(f"values: expected 0 where the column is {BLOCK}")
