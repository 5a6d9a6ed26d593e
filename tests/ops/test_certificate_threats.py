"""The kernel that counts threats beside its twin and a plain loop."""

import math

import pytest
import torch

from dtm_fast.ops import native
from dtm_fast.ops.certificate_threats import count_threats, count_threats_reference
from dtm_fast.ops.rounding import ENLARGED, norm_excess

needs_kernels = pytest.mark.skipif(
    native.why_no_cpu_kernels() is not None, reason=str(native.why_no_cpu_kernels())
)
DTYPES = [torch.float32, torch.bfloat16]


def random_case(
    positions: int, depth: int, radii: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(positions + depth)
    base = torch.randn(positions, depth, generator=generator).to(dtype)
    hidden = (base + 0.1 * torch.randn(positions, depth, generator=generator)).to(dtype)
    return hidden, base, torch.rand(positions, radii, generator=generator) * 0.2 * max(depth, 1) ** 0.5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("positions", "depth", "radii"),
    [(0, 5, 3), (1, 0, 2), (7, 1, 1), (33, 15, 4), (70, 123, 129), (5, 576, 17)],
)
@needs_kernels
def test_the_kernel_counts_as_its_twin(positions: int, depth: int, radii: int, dtype: torch.dtype) -> None:
    hidden, base, radius = random_case(positions, depth, radii, dtype)
    found = count_threats(hidden, base, radius, native_code=True)
    assert torch.equal(found, count_threats_reference(hidden, base, radius))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("native_code", [False, pytest.param(True, marks=needs_kernels)])
def test_no_distance_is_taken_for_less_than_it_is(native_code: bool, dtype: torch.dtype) -> None:
    hidden, base, _ = random_case(40, 77, 1, dtype)
    for p in range(40):
        exact = math.dist(hidden[p].double().tolist(), base[p].double().tolist())
        bound = exact * (ENLARGED + 2.0**-20) + 2 * norm_excess(77)
        above, below = torch.tensor([[bound, math.inf]]), torch.tensor([[exact, math.nan]])
        row = (hidden[p : p + 1], base[p : p + 1])
        assert count_threats(*row, above, native_code).tolist() == [0]
        assert count_threats(*row, below.float(), native_code).tolist() == [2]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("native_code", [False, pytest.param(True, marks=needs_kernels)])
def test_everything_threatens_a_state_that_is_not_finite(native_code: bool, value: float) -> None:
    hidden, base, radius = random_case(3, 20, 5, torch.float32)
    hidden[1, 7] = value
    radius[:, 0] = math.inf
    assert count_threats(hidden, base, radius, native_code)[1] == 5


@needs_kernels
def test_rows_may_be_far_apart_and_shifted() -> None:
    hidden, base, radius = random_case(9, 30, 4, torch.bfloat16)
    wide = torch.zeros(9, 64, dtype=torch.bfloat16)
    wide[:, 3:33] = hidden
    expected = count_threats_reference(hidden, base, radius)
    assert torch.equal(count_threats(wide[:, 3:33], base, radius, native_code=True), expected)
    assert torch.equal(count_threats(hidden, base, radius.T.contiguous().T, native_code=True), expected)
