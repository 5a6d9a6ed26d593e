import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dtm_fast import ops
from dtm_fast.ops import native

SHAPES = [(507, 123), (3, 513), (1, 1), (4, 8), (2, 64), (2, 7), (0, 9), (9, 0), (17,), (2, 3, 33)]


def random_mask(*shape: int) -> torch.Tensor:
    return torch.rand(shape) < 0.5


@pytest.mark.parametrize("shape", SHAPES)
def test_every_isa_agrees_with_numpy_and_the_twin(isa: str, shape: tuple[int, ...]) -> None:
    mask = random_mask(*shape)
    packed = ops.pack_mask(mask, backend="cpu")
    assert np.array_equal(packed.numpy(), np.packbits(mask.numpy(), axis=-1, bitorder="little"))
    assert torch.equal(ops.pack_mask(mask, backend="reference"), packed)
    for backend in ("cpu", "reference"):
        unpacked = ops.unpack_mask(packed, shape[-1], backend=backend)
        assert unpacked.dtype == torch.bool
        assert torch.equal(unpacked, mask)


@pytest.mark.parametrize(
    ("K", "error", "complaint"),
    [
        (9.0, TypeError, "K: expected a whole number, got 9.0"),
        (None, TypeError, "K: expected a whole number, got None"),
        ("9", TypeError, "K: expected a whole number, got '9'"),
        (True, TypeError, "K: expected a whole number, got True"),
        (-1, ValueError, "K: expected a number of at least 0, got -1"),
    ],
)
def test_a_number_of_columns_that_is_none_is_named(K: object, error: type, complaint: str) -> None:  # noqa: N803
    packed = torch.zeros(3, 2 if K != -1 else 0, dtype=torch.uint8)
    with pytest.raises(error, match=complaint):
        ops.unpack_mask(packed, K)  # type: ignore[arg-type]


def test_lowest_bit_first(backend: str) -> None:
    mask = torch.tensor([[True, False, False, False, False, False, False, False, False, True]])
    assert ops.pack_mask(mask, backend=backend).tolist() == [[1, 2]]


def test_strides(backend: str) -> None:
    base = random_mask(20, 300)
    for view in (base[:, 1:150], base[::3], base.t(), base[:, ::2], base[2:3].expand(4, 300)):
        packed = ops.pack_mask(view, backend=backend)
        assert torch.equal(packed, ops.pack_mask(view.clone(memory_format=torch.contiguous_format)))
        strided = torch.stack([packed, packed], dim=-1)[..., 0]
        assert torch.equal(ops.unpack_mask(strided, view.shape[-1], backend=backend), view)
        assert torch.equal(ops.unpack_mask(packed[1:, :], view.shape[-1], backend=backend), view[1:])


def test_wrong_arguments(backend: str) -> None:
    with pytest.raises(TypeError, match=r"mask: expected dtype torch.bool, got torch.uint8"):
        ops.pack_mask(torch.ones(2, 2, dtype=torch.uint8), backend=backend)
    with pytest.raises(ValueError, match=r"mask: expected shape \[..., K\]"):
        ops.pack_mask(torch.tensor(True), backend=backend)
    packed = ops.pack_mask(torch.ones(2, 12, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"packed: expected dtype torch.uint8, got torch.int8"):
        ops.unpack_mask(packed.to(torch.int8), 12, backend=backend)
    with pytest.raises(
        ValueError, match=r"packed: expected size 3 in dimension 1 \(ceil\(K / 8\) for K = 17\)"
    ):
        ops.unpack_mask(packed, 17, backend=backend)
    with pytest.raises(ValueError, match=r"packed: mask bits out of range: .* bits 3 to 7 .* \(K = 11\)"):
        ops.unpack_mask(packed, 11, backend=backend)


def test_rows_further_apart_than_2_to_the_31(isas: tuple[str, ...]) -> None:
    stride, columns = 2**30 + 5, 75
    mask = random_mask(3, columns)
    packed = ops.pack_mask(mask, backend="reference")
    storage = torch.empty(2 * stride + columns, dtype=torch.bool)  # pages that nobody touches take no memory
    far_mask = storage.as_strided((3, columns), (stride, 1))
    far_packed = storage.view(torch.uint8).as_strided((3, packed.shape[1]), (stride, 1))
    for each in isas:
        with native.use_cpu_isa(each):
            far_mask.copy_(mask)
            assert torch.equal(ops.pack_mask(far_mask, backend="cpu"), packed)
            far_packed.copy_(packed)
            assert torch.equal(ops.unpack_mask(far_packed, columns, backend="cpu"), mask)


@settings(deadline=None, max_examples=40)
@given(rows=st.integers(0, 5), columns=st.integers(0, 200), seed=st.integers(0, 99))
def test_packing_and_unpacking_are_inverse(isas: tuple[str, ...], rows: int, columns: int, seed: int) -> None:
    torch.manual_seed(seed)
    mask = random_mask(rows, columns)
    for each in isas:
        with native.use_cpu_isa(each):
            packed = ops.pack_mask(mask, backend="cpu")
            assert torch.equal(packed, ops.pack_mask(mask, backend="reference"))
            assert torch.equal(ops.unpack_mask(packed, columns, backend="cpu"), mask)
