import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dtm_fast import ops
from dtm_fast.ops import native

SHAPES = [(507, 123), (3, 513), (1, 1), (4, 8), (2, 64), (2, 7), (40, 33), (0, 9), (9, 0)]
DTYPES = [torch.float32, torch.bfloat16]


def random_case(rows: int, columns: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rows, columns).to(dtype), torch.rand(rows, columns) < 0.5


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_isa_and_the_twin_give_what_where_gives(
    isa: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    weight, kept = random_case(*shape, dtype)
    packed = ops.pack_mask(kept)
    for backend in ("cpu", "reference"):
        y = ops.apply_mask(weight, packed, backend=backend)
        assert y.dtype == dtype
        assert y.is_contiguous()
        assert torch.equal(y, torch.where(kept, weight, 0))


def test_what_is_dropped_does_not_count_and_what_is_kept_stays(backend: str) -> None:
    weight = torch.tensor([[torch.nan, torch.inf, -0.0, 1.0] * 5])
    kept = torch.tensor([[True] * 4 + [False] * 4 + [True] * 12])
    y = ops.apply_mask(weight, ops.pack_mask(kept), backend=backend)
    assert bool((y[0, 4:8].view(torch.int32) == 0).all())
    assert torch.equal(y[kept].view(torch.int32), weight[kept].view(torch.int32))


def test_strides(backend: str) -> None:
    weight, kept = random_case(20, 50, torch.float32)
    packed, expected = ops.pack_mask(kept), torch.where(kept, weight, 0)
    wide_weight, wide_mask = torch.randn(40, 70), torch.randint(0, 256, (40, 30)).byte()
    wide_weight[::2, 7:57], wide_mask[::2, 3:10] = weight, packed
    y = ops.apply_mask(wide_weight[::2, 7:57], wide_mask[::2, 3:10], backend=backend)
    assert torch.equal(y, expected)
    y = ops.apply_mask(weight.T.contiguous().T, packed.T.contiguous().T, backend=backend)
    assert torch.equal(y, expected)
    y = ops.apply_mask(weight[:1].expand(20, 50), packed[:1].expand(20, 7), backend=backend)
    assert torch.equal(y, expected[:1].expand(20, 50))


@pytest.mark.parametrize("forced", [None, "cpu", "reference"])
def test_its_backward_is_itself(backend: str, forced: str | None) -> None:
    weight, kept = random_case(4, 21, torch.float32)
    weight.requires_grad_()
    gradient = torch.randn(4, 21, requires_grad=True)
    y = ops.apply_mask(weight, ops.pack_mask(kept), backend=forced if forced != "cpu" else backend)
    (found,) = torch.autograd.grad(y, weight, gradient, create_graph=True)
    assert torch.equal(found, torch.where(kept, gradient, 0))
    assert torch.equal(torch.autograd.grad(found.sum(), gradient)[0], kept.float())


def test_wrong_arguments(backend: str) -> None:
    weight, kept = random_case(4, 12, torch.float32)
    packed = ops.pack_mask(kept)

    def run(**changes: object) -> None:
        ops.apply_mask(**({"weight": weight, "mask": packed, "backend": backend} | changes))  # type: ignore[arg-type]

    with pytest.raises(TypeError, match=r"weight: expected dtype torch.float32 or torch.bfloat16, got .*16"):
        run(weight=weight.half())
    with pytest.raises(TypeError, match=r"weight: expected a torch.Tensor, got list"):
        run(weight=[1.0])
    with pytest.raises(ValueError, match=r"weight: expected shape \[N, K\], got \[12\]"):
        run(weight=weight[0])
    with pytest.raises(TypeError, match=r"mask: expected dtype torch.uint8, got torch.bool"):
        run(mask=kept)
    with pytest.raises(
        ValueError, match=r"mask: expected size 2 in dimension 1 \(ceil\(K / 8\) for K = 12\)"
    ):
        run(mask=packed[:, :1])
    with pytest.raises(ValueError, match=r"mask: expected shape \[N, ceil\(K / 8\)\], got \[1, 4, 2\]"):
        run(mask=packed[None])
    with pytest.raises(ValueError, match=r"mask: expected size 4 in dimension 0 \(N of weight\)"):
        run(mask=packed[:3])
    with pytest.raises(ValueError, match=r"mask: mask bits out of range: .* bits 4 to 7 .* \(K = 12\)"):
        run(mask=packed | 128)
    with pytest.raises(ValueError, match=r"mask: expected device cpu, that of weight, got meta"):
        run(mask=packed.to("meta"))


def test_rows_further_apart_than_2_to_the_31(isas: tuple[str, ...]) -> None:
    stride, depth = 2**30 + 5, 75
    weight, kept = random_case(3, depth, torch.bfloat16)
    packed = ops.pack_mask(kept)
    storage = torch.empty(
        2 * stride + depth, dtype=torch.bfloat16
    )  # pages that nobody touches take no memory
    far = storage.as_strided((3, depth), (stride, 1))
    far.copy_(weight)
    for each in isas:
        with native.use_cpu_isa(each):
            assert torch.equal(ops.apply_mask(far, packed, backend="cpu"), torch.where(kept, weight, 0))


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(0, 40),
    columns=st.integers(0, 200),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_any_shape(isas: tuple[str, ...], rows: int, columns: int, dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    weight, kept = random_case(rows, columns, dtype)
    for each in isas:
        with native.use_cpu_isa(each):
            y = ops.apply_mask(weight, ops.pack_mask(kept), backend="cpu")
            assert torch.equal(y, torch.where(kept, weight, 0))
