import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dtm_fast import ops
from dtm_fast.ops import native

SHAPES = [(507, 123), (3, 513), (1, 1), (5, 16), (2, 31), (0, 7), (7, 0), (0, 0), (9,), (2, 3, 40)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def same(first: tuple[torch.Tensor, torch.Tensor], second: tuple[torch.Tensor, torch.Tensor]) -> bool:
    return all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_isa_gives_the_bits_of_the_twin(isa: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight = torch.randn(shape).to(dtype)
    assert same(ops.quantize_int8(weight, backend="cpu"), ops.quantize_int8(weight, backend="reference"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_is_the_documented_one_liner_and_close_to_the_weight(backend: str, dtype: torch.dtype) -> None:
    weight = torch.randn(40, 77).to(dtype)
    qweight, scale = ops.quantize_int8(weight, backend=backend)
    w = weight.float()
    assert torch.equal(scale, w.abs().amax(-1) / 127)
    assert torch.equal(qweight, torch.round(w / scale[:, None]).clamp(-127, 127).to(torch.int8))
    error = (weight.double() - qweight.double() * scale.double()[:, None]).abs()
    assert bool((error <= 0.5001 * scale.double()[:, None]).all())
    assert bool((qweight.abs().amax(-1) == 127).all())


def test_rounds_half_to_even(backend: str) -> None:
    weight = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5]])
    qweight, scale = ops.quantize_int8(weight, backend=backend)
    assert scale.tolist() == [1.0]
    assert qweight.tolist() == [[127, 0, 2, 2, 0, -2, -126]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_quotients_near_a_half(backend: str, dtype: torch.dtype) -> None:
    absmax = torch.rand(300, 1) + 0.5
    weight = (torch.randint(-127, 127, (300, 150)) + 0.5) * (absmax / 127)
    for _ in range(3):
        toward = torch.where(torch.rand(weight.shape) < 0.5, 0.0, 2 * weight)
        weight = torch.where(torch.rand(weight.shape) < 0.5, torch.nextafter(weight, toward), weight)
    weight[:, 77:78] = absmax
    weight = weight.to(dtype)
    assert same(ops.quantize_int8(weight, backend=backend), ops.quantize_int8(weight, backend="reference"))


@pytest.mark.parametrize("size", [0.0, 1e-45, 60e-45, 100e-45, 200e-45, 1e-38, 1e38, 3.4e38])
def test_tiny_and_huge_rows(backend: str, size: float) -> None:
    weight = torch.tensor([[size, -size / 2, 0.0], [1.0, 2.0, 3.0]])
    qweight, scale = ops.quantize_int8(weight, backend=backend)
    assert qweight[1].tolist() == [42, 85, 127]
    assert torch.equal(scale, weight.abs().amax(-1) / 127)
    assert (qweight[0].tolist() == [0, 0, 0]) == (scale[0].item() == 0)
    assert same((qweight, scale), ops.quantize_int8(weight, backend="reference"))


def test_strides_and_offsets(backend: str) -> None:
    base = torch.randn(20, 100)
    for view in (
        base[:, 1:98],
        base[::3],
        base.t(),
        base[:, ::2],
        base[1:2].expand(5, 100),
        base.flip(0)[:, 3:],
    ):
        expected = ops.quantize_int8(view.clone(memory_format=torch.contiguous_format), backend="reference")
        assert same(ops.quantize_int8(view, backend=backend), expected)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_non_finite_weights_are_an_error(backend: str, bad: float, dtype: torch.dtype) -> None:
    weight = torch.randn(4, 21).to(dtype)
    weight[1, 20] = weight[3, 0] = bad
    with pytest.raises(ValueError, match=r"weight: expected finite values, got 2 NaN or infinite of 84"):
        ops.quantize_int8(weight, backend=backend)


def test_wrong_arguments() -> None:
    with pytest.raises(TypeError, match=r"weight: expected a torch.Tensor, got list"):
        ops.quantize_int8([1.0])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"weight: expected dtype torch.float32 or .* got torch.int64"):
        ops.quantize_int8(torch.ones(2, 2, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"weight: expected a dense \(strided\) tensor"):
        ops.quantize_int8(torch.eye(3).to_sparse())
    with pytest.raises(ValueError, match=r"weight: expected shape \[..., K\]"):
        ops.quantize_int8(torch.tensor(1.0))


def test_parameters_are_quantized_without_a_gradient(backend: str) -> None:
    weight = torch.nn.Parameter(torch.randn(3, 8))
    qweight, scale = ops.quantize_int8(weight, backend=backend)
    assert not scale.requires_grad
    assert qweight.dtype == torch.int8


def test_threads_do_not_matter(backend: str, threads: None) -> None:
    weight = torch.randn(300, 65)
    torch.set_num_threads(1)
    one = ops.quantize_int8(weight, backend=backend)
    torch.set_num_threads(2)
    assert same(one, ops.quantize_int8(weight, backend=backend))


@pytest.mark.once
def test_more_than_2_to_the_31_elements(isas: tuple[str, ...]) -> None:
    row = torch.randn(1, 2048)
    with native.use_cpu_isa(isas[-1]):
        qweight, scale = ops.quantize_int8(row.expand(2**20 + 1, 2048))
    assert qweight.numel() > 2**31
    expected, expected_scale = ops.quantize_int8(row, backend="reference")
    assert torch.equal(qweight[-1], expected[0])
    assert scale[-1] == expected_scale[0]


@settings(deadline=None, max_examples=60)
@given(
    values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=70),
)
def test_any_finite_row(isas: tuple[str, ...], values: list[float]) -> None:
    weight = torch.tensor([values])
    expected = ops.quantize_int8(weight, backend="reference")
    assert int(expected[0].abs().max()) <= 127
    for each in isas:
        with native.use_cpu_isa(each):
            assert same(ops.quantize_int8(weight, backend="cpu"), expected)


def test_quotients_beside_every_half(backend: str) -> None:
    """Where the quotient is nearest to k + 1/2, the last bit of the division decides."""
    generator = torch.Generator().manual_seed(3)
    absmax = torch.exp2(torch.rand(400, generator=generator) * 240 - 122)
    scale = absmax / 127
    halves = torch.arange(-126.5, 127.0) * scale[:, None]
    below = torch.nextafter(halves, torch.full_like(halves, -torch.inf))
    above = torch.nextafter(halves, torch.full_like(halves, torch.inf))
    weight = torch.cat([absmax[:, None], halves, below, above], dim=1)
    expected = torch.round(weight / scale[:, None]).clamp(-127, 127).to(torch.int8)
    qweight, found = ops.quantize_int8(weight, backend=backend)
    assert torch.equal(found, scale)
    assert torch.equal(qweight, expected)
