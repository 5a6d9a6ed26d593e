import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from dtm_fast import ops
from dtm_fast.ops import native
from dtm_fast.ops.int8_linear import MAX_K

# (M, N, K)
SHAPES = [
    (507, 123, 513),
    (5, 7, 31),
    (4, 4, 64),
    (1, 1, 1),
    (3, 65, 100),
    (257, 3, 17),
    (1090, 130, 70),
    (64, 97, 66),
    (2, 700, 130),
    (7, 333, 1030),
    (16, 38, 1536),
    (24, 66, 513),
    (25, 66, 513),
    (0, 5, 8),
    (5, 0, 8),
    (5, 8, 0),
]
DTYPES = [torch.float32, torch.bfloat16]


def random_case(rows: int, columns: int, depth: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = torch.randn(rows, depth)
    qweight = torch.randint(-128, 128, (columns, depth), dtype=torch.int8)
    return x, qweight, torch.rand(columns) + 0.01


def one_liner(
    x: torch.Tensor, qweight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """What the docstring promises, in 64-bit integers."""
    qx, sx = ops.quantize_int8(x, backend="reference")
    y = (qx.long() @ qweight.long().T).float() * (sx[..., None] * scale)
    return (y if bias is None else y + bias.float()).to(x.dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_isa_gives_the_bits_of_the_twin(
    isa: str, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    x, qweight, scale = random_case(*shape)
    x = x.to(dtype)
    for bias in (None, torch.randn(shape[1]), torch.randn(shape[1]).to(dtype)):
        y = ops.int8_linear(x, qweight, scale, bias, backend="cpu")
        assert y.dtype == dtype
        assert torch.equal(y, ops.int8_linear(x, qweight, scale, bias, backend="reference"))
        assert torch.equal(y, one_liner(x, qweight, scale, bias))


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((2100, 1536, 70), torch.float32),
        ((4100, 1536, 70), torch.bfloat16),
        ((2100, 1530, 70), torch.float32),  # rows that do not begin on lines of cache
        ((2100, 1552, 70), torch.float32),  # half of the last block of columns
        ((300, 11008, 64), torch.float32),
    ],
)
def test_results_that_caches_do_not_hold(isa: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    x, qweight, scale = random_case(*shape)
    x, bias = x.to(dtype), torch.randn(shape[1])
    for _ in range(3):
        y = ops.int8_linear(x, qweight, scale, bias, backend="cpu")
        assert torch.equal(y, ops.int8_linear(x, qweight, scale, bias, backend="reference"))


@pytest.mark.parametrize("depth", [1, 15, 16, 63, 64, 65, 127, 1000, MAX_K])
def test_extremes_do_not_saturate(isa: str, depth: int) -> None:
    signs = torch.where(torch.rand(6, depth) < 0.5, -1.0, 1.0)
    signs[0], signs[1] = 1.0, -1.0
    x = signs * 3.0  # quantizes to ±127
    qweight = torch.where(torch.rand(9, depth) < 0.5, -128, 127).to(torch.int8)
    qweight[0], qweight[1], qweight[2] = 127, -128, -127
    scale = torch.ones(9)
    y = ops.int8_linear(x, qweight, scale, backend="cpu")
    assert torch.equal(y, one_liner(x, qweight, scale, None))
    assert y[0, 1] == torch.tensor(-127 * 128 * depth).float() * torch.tensor(3.0).div(127)


def test_close_to_the_float_product(backend: str) -> None:
    x, weight = torch.randn(33, 300), torch.randn(20, 300)
    qweight, scale = ops.quantize_int8(weight)
    truth = x.double() @ weight.double().T
    y = ops.int8_linear(x, qweight, scale, backend=backend).double()
    assert (
        y - truth
    ).norm() / truth.norm() < 0.015  # two int8 roundings, each about 127 ** -1 / sqrt(3) of an absmax


def test_leading_dimensions_and_strides(backend: str) -> None:
    x, qweight, scale = random_case(24, 10, 50)
    expected = one_liner(x, qweight, scale, None)
    assert torch.equal(
        ops.int8_linear(x.view(2, 3, 4, 50), qweight, scale, backend=backend), expected.view(2, 3, 4, 10)
    )
    assert torch.equal(ops.int8_linear(x[3], qweight, scale, backend=backend), expected[3])
    wide_x, wide_q = torch.randn(24, 70), torch.zeros(10, 90, dtype=torch.int8)
    wide_x[:, 7:57], wide_q[:, 5:55] = x, qweight
    assert torch.equal(ops.int8_linear(wide_x[:, 7:57], wide_q[:, 5:55], scale, backend=backend), expected)
    columns_first = qweight.T.contiguous().T
    strided_scale = torch.stack([scale, scale], 1)[:, 0]
    assert torch.equal(
        ops.int8_linear(x.T.contiguous().T, columns_first, strided_scale, backend=backend), expected
    )
    same_row = qweight[:1].expand(10, 50)
    assert torch.equal(
        ops.int8_linear(x, same_row, scale, backend=backend), one_liner(x, same_row, scale, None)
    )


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_that_is_not_finite_gives_a_row_of_nan(backend: str, bad: float, dtype: torch.dtype) -> None:
    x, qweight, scale = random_case(5, 9, 40)
    x = x.to(dtype)
    clean = ops.int8_linear(x, qweight, scale, torch.ones(9), backend=backend)
    x[2, 39] = bad
    y = ops.int8_linear(x, qweight, scale, torch.ones(9), backend=backend)
    assert bool(y[2].isnan().all())
    others = [0, 1, 3, 4]
    assert torch.equal(y[others], clean[others])


def test_a_token_of_zeros_gives_the_bias(backend: str) -> None:
    _, qweight, scale = random_case(1, 9, 40)
    bias = torch.randn(9)
    assert torch.equal(ops.int8_linear(torch.zeros(1, 40), qweight, scale, bias, backend=backend)[0], bias)


def test_a_row_does_not_depend_on_its_batch_or_the_threads(isa: str, threads: None) -> None:
    x, qweight, scale = random_case(550, 130, 200)
    torch.set_num_threads(2)
    batch = ops.int8_linear(x, qweight, scale, backend="cpu")
    torch.set_num_threads(1)
    assert torch.equal(ops.int8_linear(x, qweight, scale, backend="cpu"), batch)
    for row in (0, 1, 255, 256, 549):
        assert torch.equal(ops.int8_linear(x[row : row + 1], qweight, scale, backend="cpu")[0], batch[row])


@pytest.mark.parametrize("rows", [1, 2, 4, 5, 8, 16, 24, 25])
def test_few_tokens_in_rows_of_a_larger_tensor(isa: str, rows: int) -> None:
    x, qweight, scale = random_case(rows, 69, 1090)
    expected = one_liner(x, qweight, scale, None)
    wide_x, wide_q = torch.full((rows, 1200), 9.0), torch.full((69, 1300), 99, dtype=torch.int8)
    wide_x[:, 3:1093], wide_q[:, 5:1095] = x, qweight
    y = ops.int8_linear(wide_x[:, 3:1093], wide_q[:, 5:1095], scale, backend="cpu")
    assert torch.equal(y, expected)


def test_scales_whose_sum_overflows(backend: str) -> None:
    x, qweight, _ = random_case(3, 4, 8)
    scale = torch.full((4,), 2e38)
    expected = one_liner(x, qweight, scale, None)
    assert torch.equal(ops.int8_linear(x, qweight, scale, backend=backend), expected)


def test_wrong_arguments(backend: str) -> None:
    x, qweight, scale = random_case(3, 4, 8)

    def run(**changes: object) -> None:
        ops.int8_linear(**({"x": x, "qweight": qweight, "scale": scale, "backend": backend} | changes))  # type: ignore[arg-type]

    with pytest.raises(
        TypeError, match=r"x: expected dtype torch.float32 or torch.bfloat16, got torch.float16"
    ):
        run(x=x.half())
    with pytest.raises(TypeError, match=r"qweight: expected dtype torch.int8, got torch.uint8"):
        run(qweight=qweight.to(torch.uint8))
    with pytest.raises(ValueError, match=r"qweight: expected shape \[N, K\], got \[4\]"):
        run(qweight=qweight[:, 0])
    with pytest.raises(
        ValueError, match=r"qweight: expected size 8 in dimension 1 \(K of x\), got shape \[4, 7\]"
    ):
        run(qweight=qweight[:, :7])
    with pytest.raises(TypeError, match=r"scale: expected dtype torch.float32, got torch.float64"):
        run(scale=scale.double())
    with pytest.raises(
        ValueError, match=r"scale: expected size 4 in dimension 0 \(N of qweight\), got shape \[3\]"
    ):
        run(scale=scale[:3])
    with pytest.raises(ValueError, match=r"scale: expected finite values, got 1 NaN or infinite of 4"):
        run(scale=torch.tensor([1.0, torch.nan, 1.0, 1.0]))
    with pytest.raises(TypeError, match=r"bias: expected dtype torch.float32, got torch.bfloat16"):
        run(bias=torch.ones(4, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"bias: expected size 4 in dimension 0"):
        run(bias=torch.ones(5))
    with pytest.raises(ValueError, match=r"qweight: expected device cpu, that of x, got meta"):
        run(qweight=qweight.to("meta"))
    with pytest.raises(RuntimeError, match=r"int8_linear has no backward; call it under torch.no_grad\(\)"):
        run(x=x.clone().requires_grad_())
    too_deep = MAX_K + 1
    with pytest.raises(ValueError, match=rf"qweight: expected K <= {MAX_K} .* got {too_deep}"):
        run(x=torch.ones(1, too_deep), qweight=torch.ones(4, too_deep, dtype=torch.int8))


def test_the_limits_of_python_and_native_code_agree() -> None:
    module, reason = native.load("_cpu")
    if module is None:
        pytest.skip(reason)
    assert module.INT8_LINEAR_MAX_K == MAX_K


def test_weights_further_apart_than_2_to_the_31(isas: tuple[str, ...]) -> None:
    stride, depth = 2**30 + 5, 70
    storage = torch.empty(2 * stride + depth, dtype=torch.int8)  # pages that nobody touches take no memory
    far = storage.as_strided((3, depth), (stride, 1))
    x, qweight, scale = random_case(4, 3, depth)
    far.copy_(qweight)
    for each in isas:
        with native.use_cpu_isa(each):
            assert torch.equal(
                ops.int8_linear(x, far, scale, backend="cpu"), one_liner(x, qweight, scale, None)
            )


@settings(deadline=None, max_examples=40)
@given(rows=st.integers(0, 9), columns=st.integers(0, 9), depth=st.integers(0, 140), seed=st.integers(0, 99))
def test_any_shape(isas: tuple[str, ...], rows: int, columns: int, depth: int, seed: int) -> None:
    torch.manual_seed(seed)
    x, qweight, scale = random_case(rows, columns, depth)
    expected = ops.int8_linear(x, qweight, scale, backend="reference")
    for each in isas:
        with native.use_cpu_isa(each):
            assert torch.equal(ops.int8_linear(x, qweight, scale, backend="cpu"), expected)


def test_beside_torch_products_of_the_same_process(isa: str) -> None:
    """oneDNN configures the same tile registers for its own bfloat16 and int8 products."""
    x, w = torch.randn(64, 128), torch.randn(96, 128)
    qweight, scale = ops.quantize_int8(w)
    expected = ops.int8_linear(x, qweight, scale, backend="reference")
    product = F.linear(x.bfloat16(), w.bfloat16())
    for _ in range(5):
        assert torch.equal(ops.int8_linear(x, qweight, scale), expected)
        assert torch.equal(F.linear(x.bfloat16(), w.bfloat16()), product)
