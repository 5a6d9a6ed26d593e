"""A weight of which the kept entries are stored, beside one bit per entry: packing, checking, unpacking."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from dtm_fast.ops import checks
from dtm_fast.ops.mask_bits import check_packed, unpack_mask_reference

ROWS = 16
"""Rows of a tile."""
COLUMNS = 128
"""Columns of a tile."""
LANES = 32
WORDS = 2
"""Words of bits of a lane in a tile."""
ALIGN = 8
"""The values of every tile begin at a multiple of this."""

# A weight [strips, half, g, tiles, part, t, i, q, b], and the dimensions as the format orders them:
# strip, tile, mma = 2 part + i, lane = 4 g + t, element = 4 q + 2 half + b.
_CUT = (2, 8, -1, 4, 4, 2, 2, 2)
_STORED = (0, 3, 4, 6, 2, 5, 7, 1, 8)


class Layout(NamedTuple):
    """How a weight [N, K] is cut: `strips` of ROWS rows, each in `tiles` of COLUMNS columns."""

    strips: int
    tiles: int


def layout(N: int, K: int) -> Layout:  # noqa: N803
    """The tiles that cover [N, K]."""
    return Layout(-(-N // ROWS), -(-K // COLUMNS))


@dataclass(frozen=True, eq=False)
class BitmapWeight:
    """The kept entries of a weight [N, K], in the order in which bitmap_linear reads them.

    The weight is cut into tiles of 16 rows and 128 columns; the tiles of 16 rows follow each other in the order of
    the columns. A tile is eight matrix products of the tensor cores (mma.m16n8k16), and a lane of the GPU has eight
    elements of each. Row r and column c of a tile belong to

        product 2 (c // 32) + c % 8 // 4, lane 4 (r % 8) + c % 32 // 8,
        element 4 (c % 4 // 2) + 2 (r // 8) + c % 2.

    Bit 4 element + product % 4 of bits[strip, tile, lane, product // 4] says whether the entry is kept. The values of
    a tile are a run for each product and lane, in that order, and are filled up with 0 to a multiple of 8. A run has
    the values of elements 0 to 3 in their order, a 0 if the number of its values is odd, and the values of elements
    4 to 7 in reverse: so each four lie in two whole words of 32 bits, at the beginning or at the end of the run.

    Attributes:
        bits: [ceil(N / 16), ceil(K / 128), 32, 2] int32, 0 beyond N and K.
        begins: [tiles + 1] int64, where the values of each tile begin, and the number of values.
        values: [S] bfloat16, S a multiple of 8.
        N: the number of rows.
        K: the number of columns.

    Raises (when made from tensors):
        TypeError: a tensor has another dtype.
        ValueError: shapes, devices or contents do not fit together.

    Source: the bitmap in the order of the fragments is that of SpInfer (Fan et al. 2025).
    """

    bits: torch.Tensor
    begins: torch.Tensor
    values: torch.Tensor
    N: int
    K: int

    def __post_init__(self) -> None:
        """Check everything."""
        check_shapes(self.bits, self.begins, self.values, self.N, self.K)
        _check_contents(self)

    @classmethod
    def pack(cls, weight: torch.Tensor, mask: torch.Tensor | None = None) -> BitmapWeight:
        """Pack the entries of a weight that a mask keeps.

        Args:
            weight: [N, K] bfloat16, on any device.
            mask: [N, ceil(K / 8)] uint8, as pack_mask makes it; None keeps what is not 0.

        Raises:
            TypeError: an argument is no dense tensor of such a dtype.
            ValueError: shapes or devices do not fit, mask has bits set beyond K.
        """
        checks.tensor("weight", weight, (torch.bfloat16,))
        checks.dims("weight", weight, "[N, K]", 2)
        weight = weight.detach()
        N, K = weight.shape  # noqa: N806
        if mask is None:
            kept = weight != 0
        else:
            check_packed("mask", mask, K)
            checks.dims("mask", mask, "[N, ceil(K / 8)]", 2)
            checks.size("mask", mask, 0, N, "N of weight")
            checks.same_device("weight", weight, mask=mask)
            checks.padding_bits_zero("mask", mask, K)
            kept = unpack_mask_reference(mask, K)
        return cls.trusted(*_pack(weight, kept), N, K)

    @classmethod
    def trusted(
        cls,
        bits: torch.Tensor,
        begins: torch.Tensor,
        values: torch.Tensor,
        N: int,  # noqa: N803
        K: int,  # noqa: N803
    ) -> BitmapWeight:
        """A BitmapWeight of tensors that packing made, and that need no check."""
        weight = object.__new__(cls)
        for name, value in zip(cls.__dataclass_fields__, (bits, begins, values, N, K), strict=True):
            object.__setattr__(weight, name, value)
        return weight

    @property
    def nnz(self) -> int:
        """How many entries are kept."""
        return int(_kept(self.bits).sum())

    @property
    def density(self) -> float:
        """The share of the entries that is kept; 0 for an empty weight."""
        return self.nnz / max(self.N * self.K, 1)

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors."""
        return self.bits.nbytes + self.begins.nbytes + self.values.nbytes

    def to_dense(self) -> torch.Tensor:
        """The weight [N, K] in bfloat16, with 0 where nothing is kept."""
        kept = _kept(self.bits)
        # Every place looks up a value, so that no size depends on the data: a CUDA graph can capture this.
        values = F.pad(self.values, (0, 1))
        places = _places(kept, self.begins).clamp(min=0)
        return _from_stored(torch.where(kept, values[places], 0), self.N, self.K)


def _pack(weight: torch.Tensor, kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    cut = layout(*weight.shape)
    kept = _to_stored(kept)
    # From [word, product % 4, lane, element] of a tile to [lane, word, element, product % 4], as bits and bytes.
    eights = kept.reshape(-1, WORDS, 4, LANES, 8).permute(0, 3, 1, 4, 2).reshape(-1, 8).to(torch.uint8)
    packed = (eights << _shifts(kept)).sum(-1, dtype=torch.uint8)
    bits = packed.view(torch.int32).reshape(cut.strips, cut.tiles, LANES, WORDS)
    begins = F.pad(_tile_sizes(kept).cumsum(0), (1, 0))
    values = weight.new_zeros(int(begins[-1]))
    values[_places(kept, begins)[kept]] = _to_stored(weight)[kept]
    return bits, begins, values


def _to_stored(dense: torch.Tensor) -> torch.Tensor:
    """[strips * tiles, 2048], the entries of every tile as the values are ordered, from [N, K]."""
    cut = layout(*dense.shape)
    filler = (0, cut.tiles * COLUMNS - dense.shape[1], 0, cut.strips * ROWS - dense.shape[0])
    shape = (cut.strips, *(cut.tiles if size == -1 else size for size in _CUT))
    return F.pad(dense, filler).reshape(shape).permute(_STORED).reshape(-1, ROWS * COLUMNS)


def _from_stored(stored: torch.Tensor, N: int, K: int) -> torch.Tensor:  # noqa: N803
    """The inverse of _to_stored."""
    cut = layout(N, K)
    shape = (cut.strips, *(cut.tiles if size == -1 else size for size in _CUT))
    ordered = stored.reshape([shape[dim] for dim in _STORED])
    dense = ordered.permute([_STORED.index(dim) for dim in range(len(_STORED))])
    return dense.reshape(cut.strips * ROWS, cut.tiles * COLUMNS)[:N, :K].contiguous()


def _kept(bits: torch.Tensor) -> torch.Tensor:
    """[strips * tiles, 2048] bool, as _to_stored orders it."""
    ones = (bits.view(torch.uint8)[..., None] >> _shifts(bits)) & 1
    by_element = ones.reshape(-1, LANES, WORDS, 8, 4)
    return by_element.permute(0, 2, 4, 1, 3).reshape(-1, ROWS * COLUMNS).bool()


def _shifts(beside: torch.Tensor) -> torch.Tensor:
    """The places of the bits of a byte, on the device of a tensor."""
    return torch.arange(8, dtype=torch.uint8, device=beside.device)


def _run_sizes(kept: torch.Tensor) -> torch.Tensor:
    """[strips * tiles, 256] int64: how many values each run of a tile has, with the 0 of an odd one."""
    counts = kept.reshape(-1, ROWS * COLUMNS // 8, 8).sum(-1)
    return counts + counts % 2


def _tile_sizes(kept: torch.Tensor) -> torch.Tensor:
    """[strips * tiles] int64: how many values each tile has."""
    return (_run_sizes(kept).sum(1) + ALIGN - 1) // ALIGN * ALIGN


def _places(kept: torch.Tensor, begins: torch.Tensor) -> torch.Tensor:
    """[strips * tiles, 2048] int64: where the value of every kept entry lies; for others, at most one place beyond."""
    sizes = _run_sizes(kept)
    ends = begins[:-1, None] + sizes.cumsum(1)
    halves = kept.reshape(*sizes.shape, 2, 4).to(torch.int64)
    front, back = (halves.cumsum(-1) - halves).unbind(-2)  # how many of the same four are before an entry
    return torch.stack([(ends - sizes)[..., None] + front, ends[..., None] - 1 - back], -2).flatten(1)


def check_shapes(
    bits: torch.Tensor,
    begins: torch.Tensor,
    values: torch.Tensor,
    N: int,  # noqa: N803
    K: int,  # noqa: N803
) -> None:
    """Raise unless the tensors can be a packed weight [N, K], as far as their shapes and dtypes say."""
    checks.count("N", N)
    checks.count("K", K)
    cut = layout(N, K)
    checks.tensor("bits", bits, (torch.int32,))
    checks.tensor("begins", begins, (torch.int64,))
    checks.tensor("values", values, (torch.bfloat16,))
    for name, value, shape in (
        ("bits", bits, (cut.strips, cut.tiles, LANES, WORDS)),
        ("begins", begins, (cut.strips * cut.tiles + 1,)),
    ):
        if value.shape != shape:
            raise ValueError(
                f"{name}: expected shape {list(shape)} for N = {N}, K = {K}, got {list(value.shape)}"
            )
    checks.dims("values", values, "[any]", 1)
    for name, value in (("bits", bits), ("begins", begins), ("values", values)):
        if not value.is_contiguous():
            raise ValueError(f"{name}: expected a contiguous tensor, got strides {value.stride()}")
    checks.same_device("bits", bits, begins=begins, values=values)


def _check_contents(weight: BitmapWeight) -> None:
    """Raise ValueError unless every place of the packed weight says something that packing can have said."""
    if weight.values.data_ptr() % (ALIGN * weight.values.element_size()):
        raise ValueError(
            "values: expected to begin at a multiple of 16 bytes, as tensors do that are no views"
        )
    if weight.bits.data_ptr() % (WORDS * weight.bits.element_size()):
        raise ValueError("bits: expected to begin at a multiple of 8 bytes, as tensors do that are no views")
    kept = _kept(weight.bits)
    if int(kept.sum()) != int(_from_stored(kept, weight.N, weight.K).sum()):
        raise ValueError("bits: expected 0 beyond N and K")
    if not torch.equal(weight.begins, F.pad(_tile_sizes(kept).cumsum(0), (1, 0))):
        raise ValueError(
            "begins: expected the sums of the tiles' runs in bits, each rounded up to a multiple of 8"
        )
    checks.size("values", weight.values, 0, int(weight.begins[-1]), "the last of begins")
    is_padding = torch.ones_like(weight.values, dtype=torch.bool)
    is_padding[_places(kept, weight.begins)[kept]] = False
    if bool((weight.values[is_padding] != 0).any()):
        raise ValueError("values: expected 0 where a run or a tile is filled up")
