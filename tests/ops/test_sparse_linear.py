from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from dtm_fast import ops
from dtm_fast.ops import native

# (M, N, K)
SHAPES = [
    (507, 123, 513),
    (5, 7, 31),
    (1, 1, 1),
    (1, 600, 300),
    (2, 65, 127),
    (3, 65, 128),
    (4, 65, 600),
    (65, 1030, 40),
    (0, 5, 8),
    (5, 0, 8),
    (5, 8, 0),
]
DTYPES = [torch.float32, torch.bfloat16]


# What float32 sums of some hundred terms near 1 differ by when their order differs.
ANOTHER_ORDER = 1e-5


def random_case(
    rows: int, columns: int, depth: int, dtype: torch.dtype = torch.float32, density: float = 0.3
) -> tuple[torch.Tensor, torch.Tensor, ops.SparseWeight]:
    """x, the dense weight with 0 where nothing is kept, the packed weight."""
    weight, kept = torch.randn(columns, depth), torch.rand(columns, depth) < density
    packed = ops.SparseWeight.pack(weight, ops.pack_mask(kept), backend="reference")
    return torch.randn(rows, depth).to(dtype), torch.where(kept, weight, 0), packed


def assert_close_to_float64(
    y: torch.Tensor, x: torch.Tensor, dense: torch.Tensor, bias: torch.Tensor | None = None
) -> None:
    """The policy: error <= (entries of the row + 1) * 2^-24 of the sum of the magnitudes, the bound of a sum in
    float32 (Higham 2002, section 4.2), plus half a unit in the last place of bfloat16 for such an output."""
    wide_bias = None if bias is None else bias.double()
    truth = F.linear(x.double(), dense.double(), wide_bias)
    magnitude = F.linear(x.double().abs(), dense.double().abs(), None if bias is None else wide_bias.abs())
    bound = ((dense != 0).sum(1) + 2) * 2**-24 * magnitude
    if x.dtype == torch.bfloat16:
        bound = bound + (truth.abs() + bound) * 2**-8
    assert y.dtype == x.dtype
    assert bool(((y.double() - truth).abs() <= bound).all())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("density", [0.05, 0.5, 1.0])
def test_every_isa_against_float64(
    isa: str, shape: tuple[int, int, int], dtype: torch.dtype, density: float
) -> None:
    x, dense, packed = random_case(*shape, dtype, density)
    for bias in (None, torch.randn(shape[1]).to(dtype)):
        assert_close_to_float64(ops.sparse_linear(x, packed, bias, backend="cpu"), x, dense, bias)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_twin_against_float64(dtype: torch.dtype) -> None:
    x, dense, packed = random_case(37, 130, 300, dtype)
    bias = torch.randn(130).to(dtype)
    assert_close_to_float64(ops.sparse_linear(x, packed, bias, backend="reference"), x, dense, bias)


@pytest.mark.parametrize("M", [1, 3, 4, 16, 17, 40, 64, 130])
def test_all_instruction_sets_give_the_same_bits(isas: tuple[str, ...], M: int) -> None:  # noqa: N803
    for dtype in DTYPES:
        x, _, packed = random_case(M, 577, 601, dtype)
        results = []
        for each in isas:
            with native.use_cpu_isa(each):
                results.append(ops.sparse_linear(x, packed, backend="cpu"))
        assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_its_batch_or_the_threads(
    isa: str, dtype: torch.dtype, threads: None
) -> None:
    x, _, packed = random_case(300, 1030, 400, dtype)
    torch.set_num_threads(2)
    batch = ops.sparse_linear(x, packed, backend="cpu")
    torch.set_num_threads(1)
    assert torch.equal(ops.sparse_linear(x, packed, backend="cpu"), batch)
    torch.set_num_threads(2)
    for first, last in (
        (0, 1),
        (1, 3),
        (5, 8),
        (63, 67),
        (100, 116),
        (20, 60),
        (70, 134),
        (299, 300),
        (3, 250),
    ):
        assert torch.equal(ops.sparse_linear(x[first:last], packed, backend="cpu"), batch[first:last])


def test_the_order_of_the_sum_is_ascending_from_zero(isa: str) -> None:
    big, rest = 2.0**24, torch.ones(1, 299)  # adding 1 to 2^24 rounds back to it
    weight = torch.cat([torch.tensor([[big]]), rest], dim=1)
    packed = ops.SparseWeight.pack(weight)
    for M in (1, 5):  # noqa: N806
        x = torch.ones(M, 300)
        assert ops.sparse_linear(x, packed, backend="cpu").tolist() == [[big]] * M
        assert ops.sparse_linear(x, ops.SparseWeight.pack(weight.flip(1)), backend="cpu").tolist() == (
            [[big + 300]] * M  # 299 + 2^24 lies between two floats and goes to the even one
        )


def test_integers_are_exact(backend: str) -> None:
    x = torch.randint(-9, 10, (23, 400)).float()
    weight = torch.randint(-9, 10, (31, 400)).float() * (torch.rand(31, 400) < 0.3)
    y = ops.sparse_linear(x, ops.SparseWeight.pack(weight), backend=backend)
    assert torch.equal(y.long(), x.long() @ weight.long().T)


@pytest.mark.parametrize("M", [1, 6, 70])
@pytest.mark.parametrize("dtype", DTYPES)
def test_non_finite_x_reaches_exactly_the_rows_that_keep_it(
    backend: str,
    M: int,  # noqa: N803
    dtype: torch.dtype,
) -> None:
    x, dense, packed = random_case(M, 50, 300, dtype)
    clean = ops.sparse_linear(x, packed, backend=backend)
    for k in (0, 126, 127, 299):
        for bad in (torch.nan, torch.inf, -torch.inf):
            spoiled = x.clone()
            spoiled[M // 2, k] = bad
            y = ops.sparse_linear(spoiled, packed, backend=backend)
            reached = torch.zeros(M, 50, dtype=torch.bool)
            reached[M // 2] = dense[:, k] != 0
            assert torch.equal(~y.isfinite(), reached)
            assert torch.equal(y[~reached], clean[~reached])


def test_non_finite_weights_and_extremes(backend: str) -> None:
    weight = torch.tensor([[torch.nan, 0, 0], [torch.inf, 1, 0], [3e38, 3e38, 0], [-1e-45, 0, 0], [0, 0, 0]])
    packed = ops.SparseWeight.pack(weight, ops.pack_mask(weight != 0), backend=backend)
    for M in (1, 20):  # noqa: N806
        y = ops.sparse_linear(torch.ones(M, 3), packed, backend=backend)[-1]
        assert y[0].isnan()
        assert y[1:].tolist() == [torch.inf, torch.inf, torch.tensor(-1e-45).item(), 0.0]


def test_leading_dimensions_and_strides(backend: str) -> None:
    x, _, packed = random_case(24, 10, 50)
    bias = torch.randn(10)
    expected = ops.sparse_linear(x, packed, bias, backend=backend)
    shaped = ops.sparse_linear(x.view(2, 3, 4, 50), packed, bias, backend=backend)
    assert torch.equal(shaped, expected.view(2, 3, 4, 10))
    assert ops.sparse_linear(x[3], packed, bias, backend=backend).shape == (10,)
    wide = torch.randn(24, 70)
    wide[:, 7:57] = x
    for view in (wide[:, 7:57], x.T.contiguous().T):
        y = ops.sparse_linear(view, packed, bias.expand(2, 10)[1], backend=backend)
        assert torch.allclose(y, expected, rtol=0, atol=ANOTHER_ORDER)
    same = ops.sparse_linear(x[:1].expand(5, 50), packed, bias, backend=backend)
    assert torch.allclose(same, expected[:1].expand(5, 10), rtol=0, atol=ANOTHER_ORDER)


def test_rows_further_apart_than_2_to_the_31(isas: tuple[str, ...]) -> None:
    stride = 2**30 + 5
    x, _, packed = random_case(3, 20, 70, torch.bfloat16)
    storage = torch.empty(2 * stride + 70, dtype=torch.bfloat16)  # untouched pages take no memory
    far = storage.as_strided((3, 70), (stride, 1))
    far.copy_(x)
    for each in isas:
        with native.use_cpu_isa(each):
            expected = ops.sparse_linear(x, packed, backend="cpu")
            assert torch.equal(ops.sparse_linear(far, packed, backend="cpu"), expected)


def test_gradients(backend: str) -> None:
    x, dense, packed = random_case(4, 6, 20)
    x.requires_grad_()
    if backend == "cpu":
        for forced in ("cpu", None):
            with pytest.raises(RuntimeError, match=r"sparse_linear has no backward"):
                ops.sparse_linear(x, packed, backend=forced)
        with torch.no_grad():
            assert not ops.sparse_linear(x, packed, backend="cpu").requires_grad
    else:
        ops.sparse_linear(x, packed, backend="reference").sum().backward()
        assert x.grad is not None
        assert torch.allclose(x.grad, dense.sum(0).expand(4, 20), rtol=0, atol=ANOTHER_ORDER)


def test_wrong_arguments(backend: str) -> None:
    x, dense, packed = random_case(3, 4, 12)

    def run(x: Any = x, weight: Any = packed, bias: Any = None) -> None:
        ops.sparse_linear(x, weight, bias, backend=backend)

    with pytest.raises(TypeError, match=r"weight: expected a SparseWeight, got Tensor"):
        run(weight=dense)
    with pytest.raises(TypeError, match=r"x: expected dtype torch.float32 or .*, got torch.float64"):
        run(x=x.double())
    with pytest.raises(
        ValueError, match=r"x: expected size 12 in dimension 1 \(K of weight\), got shape \[3, 11\]"
    ):
        run(x=x[:, :11])
    with pytest.raises(TypeError, match=r"bias: expected dtype torch.float32, got torch.bfloat16"):
        run(bias=torch.ones(4, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"bias: expected size 4 in dimension 0 \(N of weight\)"):
        run(bias=torch.ones(5))
    with pytest.raises(
        ValueError, match=r"values: expected device cpu, that of x|weight: expected device meta"
    ):
        run(x=x.to("meta"))


@pytest.mark.parametrize("M", [1, 20])
def test_whatever_the_packed_tensors_hold_the_kernel_stays_inside(isa: str, M: int) -> None:  # noqa: N803
    x, _, packed = random_case(M, 100, 300)
    columns = torch.randint(0, 256, packed.columns.shape).byte()
    rows = torch.randint(-(2**15), 2**15, packed.rows.shape).to(torch.int16)
    y = torch.ops.dtm_fast.sparse_linear(x, packed.values, columns, rows, packed.steps, 100, 300, None, "cpu")
    assert y.shape == (M, 100)
    with pytest.raises(ValueError, match=r"steps: their sum does not fit the lengths of values and columns"):
        torch.ops.dtm_fast.sparse_linear(
            x, packed.values, columns, rows, packed.steps + 1, 100, 300, None, "cpu"
        )


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(0, 70),
    columns=st.integers(0, 40),
    depth=st.integers(0, 300),
    density=st.floats(0, 1),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_any_shape(
    isas: tuple[str, ...], rows: int, columns: int, depth: int, density: float, dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    x, dense, packed = random_case(rows, columns, depth, dtype, density)
    for each in isas:
        with native.use_cpu_isa(each):
            assert_close_to_float64(ops.sparse_linear(x, packed, backend="cpu"), x, dense)
