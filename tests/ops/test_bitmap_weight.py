from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dtm_fast.ops import pack_mask
from dtm_fast.ops.bitmap_weight import ALIGN, BitmapWeight, layout

TENSORS = ("bits", "begins", "values")
SHAPES = [(507, 513), (1, 1), (16, 128), (17, 129), (15, 127), (33, 640), (64, 300)]


def made(shape: tuple[int, int], density: float) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(shape).bfloat16(), torch.rand(shape) < density


def same(a: BitmapWeight, b: BitmapWeight) -> bool:
    return (a.N, a.K) == (b.N, b.K) and all(
        torch.equal(getattr(a, each), getattr(b, each)) for each in TENSORS
    )


def walk(packed: BitmapWeight) -> torch.Tensor:
    """The dense weight, as the kernel finds it: lane by lane, with what the lanes before it have."""
    cut = layout(packed.N, packed.K)
    dense = torch.zeros(cut.strips * 16, cut.tiles * 128, dtype=torch.bfloat16)
    bits, begins = packed.bits.tolist(), packed.begins.tolist()
    for strip in range(cut.strips):
        for tile in range(cut.tiles):
            end = begins[strip * cut.tiles + tile]
            assert end % ALIGN == 0
            for mma in range(8):
                for lane in range(32):
                    word = bits[strip][tile][lane][mma // 4] >> (mma % 4) & 0x11111111
                    begin, (g, t) = end, divmod(lane, 4)
                    end += (word.bit_count() + 1) // 2 * 2
                    front, back = begin, end - 1
                    for element in range(8):
                        if not word >> 4 * element & 1:
                            continue
                        # The registers of mma.m16n8k16: row g or g + 8, two pairs of columns. The second
                        # operand's are what the lane takes of a token: 16 bytes of every 32 columns, two mma.
                        register, low = divmod(element, 2)
                        row = g + 8 * (register % 2)
                        column = 32 * (mma // 2) + 8 * t + 4 * (mma % 2) + 2 * (register // 2) + low
                        at = front if element < 4 else back
                        dense[strip * 16 + row, tile * 128 + column] = packed.values[at]
                        front, back = (front + 1, back) if element < 4 else (front, back - 1)
            assert 0 <= begins[strip * cut.tiles + tile + 1] - end < ALIGN
    assert not dense[packed.N :].any()
    assert not dense[:, packed.K :].any()
    return dense[: packed.N, : packed.K]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("density", [0.0, 0.05, 0.5, 1.0])
def test_packing_keeps_what_the_mask_keeps(shape: tuple[int, int], density: float) -> None:
    weight, kept = made(shape, density)
    spoiled = torch.where(kept, weight, torch.nan)
    packed = BitmapWeight.pack(spoiled, pack_mask(kept))
    assert torch.equal(packed.to_dense(), torch.where(kept, weight, 0))
    assert packed.nnz == int(kept.sum())
    assert packed.density == packed.nnz / kept.numel()
    assert packed.nbytes == sum(getattr(packed, each).nbytes for each in TENSORS)
    assert same(
        BitmapWeight(*(getattr(packed, each) for each in TENSORS), *shape), packed
    )  # checks everything


@pytest.mark.parametrize("shape", [(17, 129), (32, 256), (5, 300)])
@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_the_kernel_finds_every_entry(shape: tuple[int, int], density: float) -> None:
    weight, kept = made(shape, density)
    assert torch.equal(walk(BitmapWeight.pack(weight, pack_mask(kept))), torch.where(kept, weight, 0))


def test_one_entry_alone() -> None:
    for n, k in [(0, 0), (7, 5), (8, 2), (15, 127), (9, 96), (3, 31)]:
        weight = torch.zeros(16, 128, dtype=torch.bfloat16)
        weight[n, k] = 3
        packed = BitmapWeight.pack(weight)
        run = [3.0, 0.0] if k % 4 < 2 else [0.0, 3.0]  # an entry of elements 0 to 3, or 4 to 7, of its lane
        assert packed.values.tolist() == run + [0.0] * 6
        assert torch.equal(packed.to_dense(), weight)
        assert torch.equal(walk(packed), weight)


def test_without_a_mask_what_is_not_zero_is_kept() -> None:
    weight = torch.tensor([[0.0, 1.0, -0.0], [torch.nan, 0.0, -2.0]]).bfloat16()
    packed = BitmapWeight.pack(weight)
    assert packed.nnz == 3
    assert packed.to_dense().nan_to_num(7).tolist() == [[0.0, 1.0, 0.0], [7.0, 0.0, -2.0]]


def test_kept_zeros_are_entries() -> None:
    kept = torch.rand(20, 200) < 0.5
    packed = BitmapWeight.pack(torch.zeros(20, 200, dtype=torch.bfloat16), pack_mask(kept))
    assert packed.nnz == kept.sum()


def test_strides() -> None:
    weight, kept = made((40, 300), 0.3)
    expected = BitmapWeight.pack(weight, pack_mask(kept))
    wide, wide_mask = torch.randn(80, 310).bfloat16(), torch.randint(0, 256, (40, 50)).byte()
    wide[::2, 5:305], wide_mask[:, 3:41] = weight, pack_mask(kept)
    assert same(BitmapWeight.pack(wide[::2, 5:305], wide_mask[:, 3:41]), expected)
    turned = weight.T.contiguous().T
    assert same(BitmapWeight.pack(turned, pack_mask(kept).T.contiguous().T), expected)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_empty(shape: tuple[int, int]) -> None:
    packed = BitmapWeight.pack(torch.randn(shape).bfloat16())
    assert packed.nnz == 0
    assert packed.density == 0
    assert packed.to_dense().shape == shape
    assert same(BitmapWeight(*(getattr(packed, each) for each in TENSORS), *shape), packed)


@pytest.mark.parametrize(("density", "bits_per_entry"), [(0.25, 6.1), (0.5, 10.1)])
def test_the_size_is_near_two_bits_per_entry_and_sixteen_per_kept_one(
    density: float, bits_per_entry: float
) -> None:
    weight, kept = made((1024, 1024), density)
    assert BitmapWeight.pack(weight, pack_mask(kept)).nbytes * 8 / weight.numel() < bits_per_entry


def test_wrong_arguments() -> None:
    weight = torch.randn(4, 12).bfloat16()
    mask = pack_mask(weight > 0)

    def pack(weight: Any = weight, mask: Any = mask) -> None:
        BitmapWeight.pack(weight, mask)

    with pytest.raises(TypeError, match=r"weight: expected dtype torch.bfloat16, got torch.float32"):
        pack(weight.float())
    with pytest.raises(ValueError, match=r"weight: expected shape \[N, K\], got \[12\]"):
        pack(weight[0])
    with pytest.raises(TypeError, match=r"mask: expected dtype torch.uint8, got torch.bool"):
        pack(mask=weight > 0)
    with pytest.raises(ValueError, match=r"mask: expected size 4 in dimension 0 \(N of weight\)"):
        pack(mask=mask[:3])
    with pytest.raises(ValueError, match=r"mask: expected size 2 in dimension 1"):
        pack(mask=mask[:, :1])
    with pytest.raises(ValueError, match=r"mask: mask bits out of range"):
        pack(mask=mask | 128)
    with pytest.raises(ValueError, match=r"mask: expected device cpu, that of weight, got meta"):
        pack(mask=mask.to("meta"))


def test_tensors_that_are_no_packed_weight() -> None:
    weight, kept = made((40, 200), 0.3)
    kept[:16, :128] = False
    kept[0, :5] = True  # the first tile: five values, filled up with three
    packed = BitmapWeight.pack(weight, pack_mask(kept))

    def changed(value: torch.Tensor, place: tuple[int, ...] | int, to: int) -> torch.Tensor:
        value = value.clone()
        value[place] = to
        return value

    with pytest.raises(TypeError, match=r"bits: expected dtype torch.int32, got torch.int64"):
        replace(packed, bits=packed.bits.long())
    with pytest.raises(TypeError, match=r"values: expected dtype torch.bfloat16, got torch.float32"):
        replace(packed, values=packed.values.float())
    with pytest.raises(ValueError, match=r"bits: expected shape \[3, 2, 32, 2\] for N = 40, K = 200"):
        replace(packed, bits=packed.bits[:2])
    with pytest.raises(ValueError, match=r"begins: expected shape \[7\] for N = 40, K = 200"):
        replace(packed, begins=packed.begins[1:])
    with pytest.raises(ValueError, match=r"values: expected shape \[any\]"):
        replace(packed, values=packed.values[None])
    with pytest.raises(ValueError, match=r"bits: expected a contiguous tensor"):
        replace(packed, bits=packed.bits.transpose(2, 3).contiguous().transpose(2, 3))
    with pytest.raises(ValueError, match=r"values: expected to begin at a multiple of 16 bytes"):
        replace(packed, values=torch.cat([packed.values[:1], packed.values])[1:])
    with pytest.raises(ValueError, match=r"bits: expected to begin at a multiple of 8 bytes"):
        replace(
            packed, bits=torch.cat([packed.bits.new_zeros(1), packed.bits.flatten()])[1:].view(3, 2, 32, 2)
        )
    with pytest.raises(ValueError, match=r"bits: expected 0 beyond N and K"):
        replace(packed, bits=changed(packed.bits, (2, 1, 31, 1), -1))
    with pytest.raises(ValueError, match=r"begins: expected the sums of the tiles' runs"):
        replace(packed, begins=changed(packed.begins, 1, 16))
    with pytest.raises(ValueError, match=r"values: expected size \d+ in dimension 0 \(the last of begins\)"):
        replace(packed, values=packed.values[:-8].clone())
    with pytest.raises(ValueError, match=r"values: expected 0 where a run or a tile is filled up"):
        replace(packed, values=changed(packed.values, 7, 1))


@settings(deadline=None, max_examples=40)
@given(N=st.integers(0, 70), K=st.integers(0, 300), density=st.floats(0, 1), seed=st.integers(0, 99))
def test_any_shape(N: int, K: int, density: float, seed: int) -> None:  # noqa: N803
    torch.manual_seed(seed)
    weight, kept = made((N, K), density)
    packed = BitmapWeight.pack(weight, pack_mask(kept))
    assert torch.equal(packed.to_dense(), torch.where(kept, weight, 0))
    assert packed.nnz == int(kept.sum())
    assert torch.equal(packed.begins % ALIGN, torch.zeros_like(packed.begins))
    replace(packed)  # checks everything
