import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from dtm_fast import ops
from dtm_fast.ops import native

# (V, M, N, K)
SHAPES = [
    (3, 507, 123, 513),
    (8, 5, 7, 31),
    (1, 1, 1, 1),
    (1, 130, 600, 300),
    (2, 3, 65, 127),
    (2, 64, 65, 128),
    (3, 65, 1030, 40),
    (0, 5, 6, 8),
    (2, 0, 5, 8),
    (2, 5, 0, 8),
    (2, 5, 8, 0),
]
DTYPES = [torch.float32, torch.bfloat16]


# What float32 sums of some hundred terms near 1 differ by when their order differs.
ANOTHER_ORDER = 2e-5


def random_ladder(
    levels: int, rows: int, columns: int, depth: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, weight, and bool masks [levels, columns, depth] that keep 90 % to 10 % of the weight."""
    x, weight = torch.randn(rows, depth).to(dtype), torch.randn(columns, depth).to(dtype)
    dropped = torch.linspace(0.1, 0.9, levels)[:, None, None]
    return x, weight, torch.rand(columns, depth) >= dropped


def assert_close_to_float64(
    y: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    kept: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> None:
    """The policy of sparse_linear: error <= (entries of the row + 2) * 2^-24 of the sum of the magnitudes, the
    bound of a sum in float32 (Higham 2002, section 4.2), plus a rounding to bfloat16 for such an output."""
    assert y.dtype == x.dtype
    assert y.shape == (len(kept), *x.shape[:-1], len(weight))
    wide_bias = None if bias is None else bias.double()
    for level, mask in zip(y, kept, strict=True):
        masked = torch.where(mask, weight, 0).double()
        truth = F.linear(x.double(), masked, wide_bias)
        magnitude = F.linear(x.double().abs(), masked.abs(), None if wide_bias is None else wide_bias.abs())
        bound = (mask.sum(1) + 2) * 2**-24 * magnitude
        if x.dtype == torch.bfloat16:
            bound = bound + (truth.abs() + bound) * 2**-8
        assert bool(((level.double() - truth).abs() <= bound).all())


def ladder(
    x: torch.Tensor, weight: torch.Tensor, kept: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    return ops.masked_linear(x, weight, ops.pack_mask(kept), bias, nested=True, backend="cpu")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_isa_against_float64(isa: str, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    x, weight, kept = random_ladder(*shape, dtype)
    for bias in (None, torch.randn(shape[2]).to(dtype)):
        assert_close_to_float64(ladder(x, weight, kept, bias), x, weight, kept, bias)


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[1] < 100])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_twin_against_float64(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    x, weight, kept = random_ladder(*shape, dtype)
    bias = torch.randn(shape[2]).to(dtype)
    y = ops.masked_linear(x, weight, ops.pack_mask(kept), bias, nested=True, backend="reference")
    assert_close_to_float64(y, x, weight, kept, bias)


@pytest.mark.parametrize("M", [1, 3, 17, 40, 64, 130])
def test_all_instruction_sets_give_the_same_bits(isas: tuple[str, ...], M: int) -> None:  # noqa: N803
    for dtype in DTYPES:
        x, weight, kept = random_ladder(4, M, 577, 301, dtype)
        results = []
        for each in isas:
            with native.use_cpu_isa(each):
                results.append(ladder(x, weight, kept))
        assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_its_batch_or_the_threads(
    isa: str, dtype: torch.dtype, threads: None
) -> None:
    x, weight, kept = random_ladder(3, 300, 530, 260, dtype)
    torch.set_num_threads(2)
    batch = ladder(x, weight, kept)
    torch.set_num_threads(1)
    assert torch.equal(ladder(x, weight, kept), batch)
    for first, last in ((0, 1), (1, 2), (63, 65), (64, 71), (299, 300), (3, 200)):
        assert torch.equal(ladder(x[first:last], weight, kept), batch[:, first:last])
    for rows in range(1, 70):
        assert torch.equal(ladder(x[100 : 100 + rows], weight, kept), batch[:, 100 : 100 + rows])


def test_a_level_does_not_depend_on_denser_ones(isa: str) -> None:
    x, weight, kept = random_ladder(6, 70, 40, 300)
    y = ladder(x, weight, kept)
    for level in range(6):
        assert torch.equal(ladder(x, weight, kept[level:]), y[level:])


def test_large_results_past_the_caches_have_the_bits_of_small_ones(isa: str) -> None:
    x, weight, kept = random_ladder(8, 2048, 528, 60)
    bias = torch.randn(528)
    y = ladder(x, weight, kept, bias)
    assert y.nbytes > 2**25
    for first in (0, 100, 1000, 2000):
        some = slice(first, first + 48)
        assert torch.equal(ladder(x[some], weight, kept, bias), y[:, some])
    odd = ladder(x, weight[:-1], kept[:, :-1], bias[:-1])  # no rows of whole cache lines
    assert_close_to_float64(odd[:, :50], x[:50], weight[:-1], kept[:, :-1], bias[:-1])
    assert_close_to_float64(odd[:, -50:], x[-50:], weight[:-1], kept[:, :-1], bias[:-1])


def test_equal_and_empty_masks(backend: str) -> None:
    x, weight, _ = random_ladder(1, 20, 37, 300)
    some = torch.rand(37, 300) < 0.5
    kept = torch.stack([torch.ones_like(some), some, some, torch.zeros_like(some), torch.zeros_like(some)])
    y = ops.masked_linear(x, weight, ops.pack_mask(kept), nested=True, backend=backend)
    assert_close_to_float64(y, x, weight, kept)
    assert torch.equal(y[1], y[2])
    assert bool((y[3:] == 0).all())


def test_integers_are_exact_and_equal_to_masked_linear(backend: str) -> None:
    _, _, kept = random_ladder(5, 23, 31, 400)
    x, weight = torch.randint(-9, 10, (23, 400)).float(), torch.randint(-9, 10, (31, 400)).float()
    packed = ops.pack_mask(kept)
    y = ops.masked_linear(x, weight, packed, nested=True, backend=backend)
    assert torch.equal(y, ops.masked_linear(x, weight, packed, backend=backend))


@pytest.mark.parametrize("dtype", DTYPES)
def test_only_what_is_kept_counts(backend: str, dtype: torch.dtype) -> None:
    x, weight, kept = random_ladder(3, 6, 40, 140, dtype)
    packed = ops.pack_mask(kept)
    clean = ops.masked_linear(x, weight, packed, nested=True, backend=backend)
    spoiled = torch.where(kept[0], weight, torch.nan)
    assert torch.equal(ops.masked_linear(x, spoiled, packed, nested=True, backend=backend), clean)
    for bad in (torch.nan, torch.inf, -torch.inf):
        x[2, 139] = bad
        y = ops.masked_linear(x, weight, packed, nested=True, backend=backend)
        assert torch.equal(~y[:, 2].isfinite(), kept[:, :, 139])
        assert torch.equal(y[:, 2].isfinite(), clean[:, 2].eq(y[:, 2]))
        assert torch.equal(y[:, [0, 1, 3, 4, 5]], clean[:, [0, 1, 3, 4, 5]])


def test_leading_dimensions_and_strides(backend: str) -> None:
    x, weight, kept = random_ladder(2, 24, 10, 50)
    packed, bias = ops.pack_mask(kept), torch.randn(10)

    def run(x: torch.Tensor, weight: torch.Tensor, mask: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return ops.masked_linear(x, weight, mask, bias, nested=True, backend=backend)

    def close(y: torch.Tensor, expected: torch.Tensor) -> bool:
        return torch.allclose(y, expected, rtol=0, atol=ANOTHER_ORDER)

    expected = run(x, weight, packed, bias)
    assert close(run(x.view(2, 3, 4, 50), weight, packed, bias), expected.view(2, 2, 3, 4, 10))
    assert run(x[3], weight, packed, bias).shape == (2, 10)
    wide_x, wide_w = torch.randn(24, 70), torch.randn(20, 90)
    wide_m = torch.randint(0, 256, (4, 10, 30)).byte()
    wide_x[:, 7:57], wide_w[::2, 5:55], wide_m[::2, :, 3:10] = x, weight, packed
    assert close(run(wide_x[:, 7:57], wide_w[::2, 5:55], wide_m[::2, :, 3:10], bias), expected)
    y = run(x.T.contiguous().T, weight.T.contiguous().T, packed.mT.contiguous().mT, bias.expand(2, 10)[1])
    assert close(y, expected)
    y = run(x[:1].expand(5, 50), weight, packed[:1].expand(3, 10, 7), bias)
    assert close(y, expected[:1, :1].expand(3, 5, 10))


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_are_those_of_masked_linear(backend: str, compiled: bool) -> None:
    torch.compiler.reset()
    _, weight, kept = random_ladder(3, 4, 6, 20)
    x, packed = torch.randn(2, 2, 20), ops.pack_mask(kept)
    run = ops.masked_linear
    if compiled:
        run = torch.compile(run, fullgraph=True, backend="aot_eager")
    gradients = []
    for nested in (False, True):
        leaves = [each.clone().requires_grad_() for each in (x, weight, torch.ones(6))]
        y = run(leaves[0], leaves[1], packed, leaves[2], nested=nested, backend=backend)
        (y * torch.arange(y.numel()).view_as(y)).sum().backward()
        gradients.append([each.grad for each in leaves])
    for plain, with_nested in zip(*gradients, strict=True):
        # Sums of gradients of some hundred each, in another order.
        assert torch.allclose(plain, with_nested, rtol=1e-5, atol=1e-4)


def test_the_operator_passes_opcheck(backend: str) -> None:
    x, weight, kept = random_ladder(3, 5, 11, 37)
    for gradient in (False, True):
        values = (x.requires_grad_(gradient), weight, ops.pack_mask(kept), torch.randn(11), backend, True)
        torch.library.opcheck(torch.ops.dtm_fast.masked_linear.default, values)


@pytest.mark.once
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_breaks(dynamic: bool) -> None:
    torch.compiler.reset()
    x, weight, kept = random_ladder(3, 5, 11, 37)
    packed = ops.pack_mask(kept)
    compiled = torch.compile(ops.masked_linear, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    expected = ops.masked_linear(x, weight, packed, nested=True)
    assert torch.equal(compiled(x, weight, packed, nested=True), expected)


def test_wrong_masks(backend: str) -> None:
    x, weight, kept = random_ladder(4, 3, 5, 20)
    packed = ops.pack_mask(kept)

    def run(mask: torch.Tensor) -> None:
        ops.masked_linear(x, weight, mask, nested=True, backend=backend)

    with pytest.raises(ValueError, match=r"mask: expected shape \[V, N, ceil\(K / 8\)\] for nested masks"):
        run(packed[0])
    with pytest.raises(
        ValueError, match=r"mask: expected nested masks.* mask\[1\] keeps what mask\[0\] does"
    ):
        run(packed.flip(0))
    packed[0, 2], packed[1:, 2], packed[2, 2, 1] = 255 >> 4, 0, 8
    with pytest.raises(
        ValueError, match=r"mask: expected nested masks.* mask\[2\] keeps what mask\[1\] does"
    ):
        run(packed)
    packed[2, 2, 1], packed[3, 4, 2] = 0, 128
    with pytest.raises(ValueError, match=r"mask: mask bits out of range"):
        run(packed)


@settings(deadline=None, max_examples=40)
@given(
    levels=st.integers(0, 4),
    rows=st.integers(0, 70),
    columns=st.integers(0, 40),
    depth=st.integers(0, 300),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_any_shape(
    isas: tuple[str, ...],
    levels: int,
    rows: int,
    columns: int,
    depth: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    x, weight, kept = random_ladder(levels, rows, columns, depth, dtype)
    for each in isas:
        with native.use_cpu_isa(each):
            assert_close_to_float64(ladder(x, weight, kept), x, weight, kept)
