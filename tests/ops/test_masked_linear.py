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
    (12, 32, 256),
    (1, 1, 1),
    (3, 65, 600),
    (241, 3, 17),
    (0, 5, 8),
    (5, 0, 8),
    (5, 8, 0),
]
DTYPES = [torch.float32, torch.bfloat16]


# What float32 sums of some hundred terms near 1 differ by when their order differs.
ANOTHER_ORDER = 1e-5


def random_case(
    rows: int, columns: int, depth: int, dtype: torch.dtype = torch.float32, variants: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x, weight = torch.randn(rows, depth).to(dtype), torch.randn(columns, depth).to(dtype)
    leading = () if variants is None else (variants,)
    return x, weight, torch.rand(*leading, columns, depth) < 0.5


def assert_no_worse_than_torch(
    y: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    kept: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> None:
    """The policy: error <= that of torch in this dtype + 2^-22 of the sum of the products' magnitudes."""
    masked = torch.where(kept, weight, 0)
    truth = F.linear(x.double(), masked.double(), None if bias is None else bias.double())
    torch_error = (F.linear(x, masked, bias).double() - truth).abs()
    magnitude = F.linear(
        x.double().abs(), masked.double().abs(), None if bias is None else bias.double().abs()
    )
    assert y.dtype == x.dtype
    assert bool(((y.double() - truth).abs() <= torch_error + 2**-22 * magnitude).all())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_isa_is_no_worse_than_torch(isa: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    x, weight, kept = random_case(*shape, dtype)
    packed = ops.pack_mask(kept)
    for bias in (None, torch.randn(shape[1]).to(dtype)):
        assert_no_worse_than_torch(
            ops.masked_linear(x, weight, packed, bias, backend="cpu"), x, weight, kept, bias
        )


@pytest.mark.parametrize("variants", [0, 1, 3, 11])
@pytest.mark.parametrize("dtype", DTYPES)
def test_each_variant_is_its_own_product(backend: str, variants: int, dtype: torch.dtype) -> None:
    x, weight, kept = random_case(14, 37, 300, dtype, variants)
    bias = torch.randn(37).to(dtype)
    y = ops.masked_linear(x, weight, ops.pack_mask(kept), bias, backend=backend)
    assert y.shape == (variants, 14, 37)
    for each, mask in zip(y, kept, strict=True):
        assert torch.equal(each, ops.masked_linear(x, weight, ops.pack_mask(mask), bias, backend=backend))
        assert_no_worse_than_torch(each, x, weight, mask, bias)


@pytest.mark.parametrize("one_sign", [False, True])
@pytest.mark.parametrize("depth", [576, 4096, 11008])
def test_float32_in_pieces_has_less_error_than_torch(
    isas: tuple[str, ...], depth: int, one_sign: bool
) -> None:
    """On AMX: three numbers of bfloat16 for each of float32, summed in blocks."""
    if "amx" not in isas:
        pytest.skip("no AMX: only its tiles multiply float32 in pieces")
    x, weight, kept = random_case(150, 70, depth, torch.float32)
    if one_sign:
        x, weight = x.abs(), weight.abs()
    masked = torch.where(kept, weight, 0)
    exact = x.double() @ masked.double().T
    with native.use_cpu_isa("amx"):
        ours = ops.masked_linear(x, weight, ops.pack_mask(kept), backend="cpu") - exact
    theirs = F.linear(x, masked) - exact
    assert ours.square().mean() < theirs.square().mean()
    assert ours.abs().max() < 2 * theirs.abs().max()


def test_all_instruction_sets_give_the_same_bits(isas: tuple[str, ...]) -> None:
    """But for AMX, and bfloat16 on AVX512-BF16, which sum in orders of their own."""
    for dtype in DTYPES:
        x, weight, kept = random_case(250, 77, 601, dtype, 2)
        results = []
        own = ("amx",) if dtype == torch.float32 else ("avx512_bf16", "amx")
        for each in (each for each in isas if each not in own):
            with native.use_cpu_isa(each):
                results.append(ops.masked_linear(x, weight, ops.pack_mask(kept), backend="cpu"))
        assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_its_batch_or_the_threads(
    isa: str, dtype: torch.dtype, threads: None
) -> None:
    x, weight, kept = random_case(550, 130, 600, dtype)
    packed = ops.pack_mask(kept)
    torch.set_num_threads(2)
    batch = ops.masked_linear(x, weight, packed, backend="cpu")
    torch.set_num_threads(1)
    assert torch.equal(ops.masked_linear(x, weight, packed, backend="cpu"), batch)
    for first, last in ((0, 1), (1, 2), (239, 241), (240, 247), (549, 550), (3, 300)):
        assert torch.equal(ops.masked_linear(x[first:last], weight, packed, backend="cpu"), batch[first:last])
    for rows in range(1, 41):
        few = ops.masked_linear(x[100 : 100 + rows], weight, packed, backend="cpu")
        assert torch.equal(few, batch[100 : 100 + rows])


def test_denormals_are_kept_or_taken_as_zero(isa: str) -> None:
    """Both are sums of the products' true values up to what denormals add, 2^-126 of each factor beside it."""
    x, weight, kept = random_case(20, 50, 100, torch.bfloat16)
    x[:, ::3] *= 2.0**-126
    y = ops.masked_linear(x, weight, ops.pack_mask(kept), backend="cpu")
    assert_no_worse_than_torch(y, x, weight, kept)
    tiny = (x * 2.0**-126).double()
    masked = torch.where(kept, weight, 0).double()
    y = ops.masked_linear(tiny.bfloat16(), weight, ops.pack_mask(kept), backend="cpu").double()
    truth = tiny.bfloat16().double() @ masked.T
    assert bool(((y - truth).abs() <= 2.0**-8 * truth.abs() + 2.0**-126 * (1 + masked.abs().sum(1))).all())


@pytest.mark.parametrize("offset", [0, 1, 3])
def test_odd_strides_and_misaligned_rows_change_nothing(isa: str, offset: int) -> None:
    for depth in (33, 64, 351):
        x, weight, kept = random_case(35, 45, depth, torch.bfloat16)
        expected = ops.masked_linear(x, weight, ops.pack_mask(kept), backend="cpu")
        wide_x, wide_weight = (
            torch.full((len(each), depth + 10 + offset), torch.nan) for each in (x, weight)
        )
        wide_x, wide_weight = wide_x.bfloat16(), wide_weight.bfloat16()
        part = slice(offset, offset + depth)
        wide_x[:, part], wide_weight[:, part] = x, weight
        y = ops.masked_linear(wide_x[:, part], wide_weight[:, part], ops.pack_mask(kept), backend="cpu")
        assert torch.equal(y, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_number_of_tokens_and_variants_gives_the_same_bits(isa: str, dtype: torch.dtype) -> None:
    x, weight, kept = random_case(64, 75, 601, dtype, 3)
    packed = ops.pack_mask(kept)
    batch = ops.masked_linear(x, weight, packed, backend="cpu")
    for rows in range(1, 41):
        few = ops.masked_linear(x[:rows], weight, packed, backend="cpu")
        assert torch.equal(few, batch[:, :rows])
        assert torch.equal(ops.masked_linear(x[:rows], weight, packed[1], backend="cpu"), few[1])


def test_integers_are_exact(backend: str) -> None:
    x = torch.randint(-9, 10, (23, 400)).float()
    weight = torch.randint(-9, 10, (31, 400)).float()
    kept = torch.rand(31, 400) < 0.3
    y = ops.masked_linear(x, weight, ops.pack_mask(kept), backend=backend)
    assert torch.equal(y.long(), x.long() @ (weight * kept).long().T)


@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_out_weights_do_not_count_and_non_finite_x_spreads(backend: str, dtype: torch.dtype) -> None:
    x, weight, kept = random_case(6, 10, 70, dtype)
    packed = ops.pack_mask(kept)
    spoiled = torch.where(kept, weight, torch.nan)
    clean = ops.masked_linear(x, weight, packed, backend=backend)
    assert torch.equal(ops.masked_linear(x, spoiled, packed, backend=backend), clean)
    assert bool(
        ops.masked_linear(x, spoiled, ops.pack_mask(torch.ones_like(kept)), backend=backend).isnan().all()
    )
    for bad in (torch.nan, torch.inf):
        x[2, 69] = bad
        y = ops.masked_linear(x, weight, packed, backend=backend)
        assert torch.equal(y.isnan(), F.linear(x, torch.where(kept, weight, 0)).isnan())
        assert torch.equal(y[[0, 1, 3, 4, 5]], clean[[0, 1, 3, 4, 5]])


def test_leading_dimensions_and_strides(backend: str) -> None:
    x, weight, kept = random_case(24, 10, 50, variants=2)
    packed, bias = ops.pack_mask(kept), torch.randn(10)
    expected = ops.masked_linear(x, weight, packed, bias, backend=backend)
    shaped = ops.masked_linear(x.view(2, 3, 4, 50), weight, packed, bias, backend=backend)
    assert torch.allclose(shaped, expected.view(2, 2, 3, 4, 10), rtol=0, atol=ANOTHER_ORDER)
    assert ops.masked_linear(x[3], weight, packed[0], bias, backend=backend).shape == (10,)
    wide_x, wide_w, wide_m = (
        torch.randn(24, 70),
        torch.randn(20, 90),
        torch.randint(0, 256, (4, 10, 30)).byte(),
    )
    wide_x[:, 7:57], wide_w[::2, 5:55], wide_m[::2, :, 3:10] = x, weight, packed
    y = ops.masked_linear(wide_x[:, 7:57], wide_w[::2, 5:55], wide_m[::2, :, 3:10], bias, backend=backend)
    assert torch.allclose(y, expected, rtol=0, atol=ANOTHER_ORDER)
    y = ops.masked_linear(
        x.T.contiguous().T,
        weight.T.contiguous().T,
        packed.mT.contiguous().mT,
        bias.expand(2, 10)[1],
        backend=backend,
    )
    assert torch.allclose(y, expected, rtol=0, atol=ANOTHER_ORDER)
    y = ops.masked_linear(x[:1].expand(5, 50), weight, packed[0, :1].expand(10, 7), bias, backend=backend)
    assert torch.allclose(
        y, F.linear(x[:1].expand(5, 50), weight * kept[0, :1], bias), rtol=0, atol=ANOTHER_ORDER
    )


def test_gradients(backend: str) -> None:
    x, weight, kept = random_case(4, 6, 20)
    x.requires_grad_()
    weight.requires_grad_()
    packed = ops.pack_mask(kept)
    ops.masked_linear(x, weight, packed, backend=backend).sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad != 0, kept)
    with torch.no_grad():
        assert not ops.masked_linear(x, weight, packed, backend=backend).requires_grad


def test_wrong_arguments(backend: str) -> None:
    x, weight, kept = random_case(3, 4, 12)
    packed = ops.pack_mask(kept)

    def run(**changes: object) -> None:
        ops.masked_linear(**({"x": x, "weight": weight, "mask": packed, "backend": backend} | changes))  # type: ignore[arg-type]

    with pytest.raises(
        TypeError, match=r"x: expected dtype torch.float32 or torch.bfloat16, got torch.float64"
    ):
        run(x=x.double())
    with pytest.raises(TypeError, match=r"x: expected a torch.Tensor, got list"):
        run(x=[1.0])
    with pytest.raises(TypeError, match=r"weight: expected dtype torch.float32, got torch.bfloat16"):
        run(weight=weight.bfloat16())
    with pytest.raises(
        ValueError, match=r"weight: expected size 12 in dimension 1 \(K of x\), got shape \[4, 11\]"
    ):
        run(weight=weight[:, :11])
    with pytest.raises(TypeError, match=r"mask: expected dtype torch.uint8, got torch.bool"):
        run(mask=kept)
    with pytest.raises(
        ValueError, match=r"mask: expected size 2 in dimension 1 \(ceil\(K / 8\) for K = 12\)"
    ):
        run(mask=packed[:, :1])
    with pytest.raises(ValueError, match=r"mask: expected shape \[N, ceil\(K / 8\)\] or .* got \[2\]"):
        run(mask=packed[0])
    with pytest.raises(ValueError, match=r"mask: expected size 4 in dimension 0 \(N of weight\)"):
        run(mask=packed[:3])
    with pytest.raises(ValueError, match=r"mask: mask bits out of range: .* bits 4 to 7 .* \(K = 12\)"):
        run(mask=packed | 128)
    with pytest.raises(TypeError, match=r"bias: expected dtype torch.float32, got torch.bfloat16"):
        run(bias=torch.ones(4, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"bias: expected shape \[N\], got \[1, 4\]"):
        run(bias=torch.ones(1, 4))
    with pytest.raises(ValueError, match=r"mask: expected device cpu, that of x, got meta"):
        run(mask=packed.to("meta"))


def test_rows_further_apart_than_2_to_the_31(isas: tuple[str, ...]) -> None:
    stride, depth = 2**30 + 5, 70
    x, weight, kept = random_case(3, 3, depth, torch.bfloat16)
    storage = torch.empty(
        2 * stride + depth, dtype=torch.bfloat16
    )  # pages that nobody touches take no memory
    far = storage.as_strided((3, depth), (stride, 1))
    for each in isas:
        with native.use_cpu_isa(each):
            expected = ops.masked_linear(x, weight, ops.pack_mask(kept), backend="cpu")
            far.copy_(weight)
            assert torch.equal(ops.masked_linear(x, far, ops.pack_mask(kept), backend="cpu"), expected)
            far.copy_(x)
            assert torch.equal(ops.masked_linear(far, weight, ops.pack_mask(kept), backend="cpu"), expected)


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(0, 14),
    columns=st.integers(0, 40),
    depth=st.integers(0, 300),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_any_shape(
    isas: tuple[str, ...], rows: int, columns: int, depth: int, dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    x, weight, kept = random_case(rows, columns, depth, dtype)
    for each in isas:
        with native.use_cpu_isa(each):
            y = ops.masked_linear(x, weight, ops.pack_mask(kept), backend="cpu")
            assert_no_worse_than_torch(y, x, weight, kept)
