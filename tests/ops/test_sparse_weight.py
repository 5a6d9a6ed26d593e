from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dtm_fast import ops
from dtm_fast.ops import native
from dtm_fast.ops.sparse_weight import BLOCK, layout

TENSORS = ("values", "columns", "rows", "steps")


def same(a: ops.SparseWeight, b: ops.SparseWeight) -> bool:
    return (a.N, a.K) == (b.N, b.K) and all(
        torch.equal(getattr(a, each), getattr(b, each)) for each in TENSORS
    )


@pytest.mark.parametrize("shape", [(507, 513), (1, 1), (17, 127), (16, 128), (600, 254), (1030, 130)])
@pytest.mark.parametrize("density", [0.0, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packing_keeps_what_the_mask_keeps(
    backend: str, shape: tuple[int, int], density: float, dtype: torch.dtype
) -> None:
    weight, kept = torch.randn(shape).to(dtype), torch.rand(shape) < density
    spoiled = torch.where(kept, weight, torch.nan)
    packed = ops.SparseWeight.pack(spoiled, ops.pack_mask(kept), backend=backend)
    assert torch.equal(packed.to_dense(), torch.where(kept, weight, 0).float())
    assert packed.nnz == int(kept.sum())
    assert packed.density == packed.nnz / kept.numel()
    assert packed.nbytes == sum(getattr(packed, each).nbytes for each in TENSORS)
    made = ops.SparseWeight(*(getattr(packed, each) for each in TENSORS), *shape)  # checks everything
    assert same(made, packed)
    assert same(ops.SparseWeight.pack(spoiled, ops.pack_mask(kept), backend="reference"), packed)


def test_without_a_mask_what_is_not_zero_is_kept(backend: str) -> None:
    weight = torch.tensor([[0.0, 1.0, -0.0], [torch.nan, 0.0, -2.0]])
    packed = ops.SparseWeight.pack(weight, backend=backend)
    assert packed.nnz == 3
    assert torch.equal(packed.to_dense().nan_to_num(7), torch.tensor([[0.0, 1.0, 0.0], [7.0, 0.0, -2.0]]))


def test_kept_zeros_are_entries(backend: str) -> None:
    kept = torch.rand(20, 200) < 0.5
    assert ops.SparseWeight.pack(torch.zeros(20, 200), ops.pack_mask(kept), backend=backend).nnz == kept.sum()


def test_the_number_of_threads_does_not_count(threads: None) -> None:
    weight, mask = torch.randn(700, 400), ops.pack_mask(torch.rand(700, 400) < 0.2)
    torch.set_num_threads(1)
    one = ops.SparseWeight.pack(weight, mask)
    torch.set_num_threads(2)
    assert same(ops.SparseWeight.pack(weight, mask), one)


def test_strides(backend: str) -> None:
    weight, kept = torch.randn(40, 300), torch.rand(40, 300) < 0.3
    expected = ops.SparseWeight.pack(weight, ops.pack_mask(kept), backend=backend)
    wide, wide_mask = torch.randn(80, 310), torch.randint(0, 256, (40, 50)).byte()
    wide[::2, 5:305], wide_mask[:, 3:41] = weight, ops.pack_mask(kept)
    assert same(ops.SparseWeight.pack(wide[::2, 5:305], wide_mask[:, 3:41], backend=backend), expected)
    turned = weight.T.contiguous().T
    assert same(
        ops.SparseWeight.pack(turned, ops.pack_mask(kept).T.contiguous().T, backend=backend), expected
    )


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_empty(backend: str, shape: tuple[int, int]) -> None:
    packed = ops.SparseWeight.pack(torch.randn(shape), backend=backend)
    assert packed.nnz == 0
    assert packed.density == 0
    assert packed.to_dense().shape == shape
    assert same(ops.SparseWeight(*(getattr(packed, each) for each in TENSORS), *shape), packed)


def test_groups_are_nearly_full() -> None:
    packed = ops.SparseWeight.pack(torch.randn(4096, 508), ops.pack_mask(torch.rand(4096, 508) < 0.1))
    assert packed.values.numel() < 1.05 * packed.nnz


def test_wrong_arguments(backend: str) -> None:
    weight = torch.randn(4, 12)
    mask = ops.pack_mask(weight > 0)

    def pack(weight: Any = weight, mask: Any = mask) -> None:
        ops.SparseWeight.pack(weight, mask, backend=backend)

    with pytest.raises(TypeError, match=r"weight: expected dtype torch.float32 or .*, got torch.float64"):
        pack(weight.double())
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
    packed = ops.SparseWeight.pack(torch.randn(40, 200), ops.pack_mask(torch.rand(40, 200) < 0.5))

    def changed(value: torch.Tensor, *places: tuple[int, ...], to: int) -> torch.Tensor:
        value = value.clone()
        for place in places:
            value[place] = to
        return value

    with pytest.raises(TypeError, match=r"values: expected dtype torch.float32, got torch.float64"):
        replace(packed, values=packed.values.double())
    with pytest.raises(ValueError, match=r"columns: expected shape \[any, 16, 4\]"):
        replace(packed, columns=packed.columns[:, :8])
    with pytest.raises(ValueError, match=r"rows: expected shape \[1, 2, 48\] for N = 40, K = 200"):
        replace(packed, rows=packed.rows[:, :1])
    with pytest.raises(ValueError, match=r"steps: expected shape .* for N = 40, K = 300"):
        replace(packed, K=300, rows=torch.zeros(1, 3, 48, dtype=torch.int16))
    with pytest.raises(ValueError, match=r"columns: expected a contiguous tensor"):
        replace(packed, columns=packed.columns.transpose(1, 2).contiguous().transpose(1, 2))
    with pytest.raises(
        ValueError, match=r"values: expected size \d+ in dimension 0 \(the steps of all groups"
    ):
        replace(packed, values=packed.values[1:])
    with pytest.raises(ValueError, match=r"columns: expected size \d+ in dimension 0"):
        replace(packed, columns=packed.columns[1:])
    with pytest.raises(ValueError, match=r"steps: expected at most the number of columns"):
        replace(packed, steps=changed(packed.steps, (0, 1, 0), to=74))
    with pytest.raises(ValueError, match=r"rows: expected every row of the panel once"):
        replace(packed, rows=changed(packed.rows, (0, 0, 3), to=int(packed.rows[0, 0, 4])))
    with pytest.raises(ValueError, match=r"columns: expected ascending columns"):
        replace(packed, columns=changed(packed.columns, (0, 0, 0), (0, 0, 1), to=5))
    with pytest.raises(ValueError, match=r"columns: expected columns of the block, or 127 for padding"):
        replace(packed, columns=changed(packed.columns, (0, 0, 0), to=200))
    with pytest.raises(ValueError, match=r"columns: expected padding only in rows beyond N"):
        replace(packed, columns=changed(packed.columns, (-1, 15, 0), to=5))
    with pytest.raises(ValueError, match=rf"values: expected 0 where the column is {BLOCK}"):
        replace(packed, values=changed(packed.values, (-1, 15), to=1))


@settings(deadline=None, max_examples=40)
@given(N=st.integers(0, 70), K=st.integers(0, 300), density=st.floats(0, 1), seed=st.integers(0, 99))
def test_any_shape(isas: tuple[str, ...], N: int, K: int, density: float, seed: int) -> None:  # noqa: N803
    torch.manual_seed(seed)
    weight, kept = torch.randn(N, K), torch.rand(N, K) < density
    twin = ops.SparseWeight.pack(weight, ops.pack_mask(kept), backend="reference")
    assert torch.equal(twin.to_dense(), torch.where(kept, weight, 0))
    with native.use_cpu_isa(isas[0]):
        assert same(ops.SparseWeight.pack(weight, ops.pack_mask(kept), backend="cpu"), twin)


@pytest.mark.parametrize("N", [1, 16, 17, 511, 512, 513, 576, 4096, 5000])
def test_the_layout_covers_all_rows_with_few_to_spare(N: int) -> None:  # noqa: N803
    cut = layout(N, 300)
    assert cut.rows % 16 == 0
    assert cut.rows <= 512
    assert N <= cut.panels * cut.rows < N + 16 * cut.panels
    assert cut.blocks == 3


def test_sizes_that_are_none_are_named() -> None:
    with pytest.raises(ValueError, match="N: expected a number of at least 0, got -3"):
        ops.SparseWeight.empty(-3, 4)
    with pytest.raises(ValueError, match="K: expected a number of at least 0, got -4"):
        ops.SparseWeight.empty(3, -4)
    weight = ops.SparseWeight.pack(torch.randn(7, 33))
    with pytest.raises(TypeError, match=r"N: expected a whole number, got 7\.0"):
        replace(weight, N=7.0)
