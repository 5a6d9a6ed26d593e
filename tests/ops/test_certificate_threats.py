"""The kernels that count threats and select what they threaten, beside their twins and plain loops."""

import math

import pytest
import torch

from dtm_fast.ops import native
from dtm_fast.ops.certificate_threats import (
    count_threats,
    count_threats_reference,
    select_threatened,
    select_threatened_reference,
)
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
def test_the_kernel_counts_as_its_twin(
    isa: str, positions: int, depth: int, radii: int, dtype: torch.dtype
) -> None:
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


@pytest.mark.parametrize("native_code", [False, pytest.param(True, marks=needs_kernels)])
@pytest.mark.parametrize(
    ("positions", "kept", "vocabulary"), [(0, 3, 5), (1, 0, 1), (40, 1, 7), (90, 16, 200), (300, 40, 1001)]
)
def test_the_tokens_of_a_stage(native_code: bool, positions: int, kept: int, vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(positions + kept)
    threats = torch.randint(0, kept + 2, (positions,), generator=generator)
    top, reference = torch.randint(0, vocabulary, (2, positions), generator=generator)
    nearest = torch.randint(0, vocabulary, (positions, kept), generator=generator)
    for least, most in ((1, kept), (kept // 2, kept), (0, 0), (kept, kept)):
        chosen = [p for p in range(positions) if least <= threats[p] <= most]
        tokens = {int(t) for p in chosen for t in (top[p], reference[p], *nearest[p, : threats[p]])}
        found = select_threatened(threats, top, nearest, reference, (least, most), vocabulary, native_code)
        assert found.positions.tolist() == chosen
        assert found.tokens.tolist() == sorted(tokens)
        assert found.tokens[found.own].tolist() == reference[chosen].tolist()
        twin = select_threatened_reference(threats, top, nearest, reference, (least, most))
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, twin, strict=True))


@needs_kernels
@pytest.mark.parametrize("wrong", [-1, 7])
def test_a_token_outside_the_vocabulary_is_an_error(wrong: int) -> None:
    threats, one = torch.ones(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(IndexError, match="not in the vocabulary"):
        select_threatened(threats, one, torch.tensor([[wrong]]), one, (1, 1), 7, native_code=True)
