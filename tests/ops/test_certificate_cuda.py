"""A certificate on a GPU answers as the full CUDA op does, to the last bit, wherever the hidden states are put."""

import math
from types import ModuleType

import pytest
import torch
from torch import Tensor

from dtm_fast import ops
from dtm_fast.ops.certificate_threats import count_threats, count_threats_reference
from dtm_fast.ops.certified_cuda import Group, classes_of, groups, threats_of

DTYPES = [torch.float32, torch.bfloat16]
MANY = 10**6


def test_classes_reach_from_one_to_the_next() -> None:
    assert [classes_of(kept) for kept in (0, 1, 16, 17, 128, 256, 257, 4096, 4097)] == [
        0, 1, 1, 2, 2, 2, 3, 3, 4,
    ]  # fmt: skip
    assert threats_of(Group(0, 0, 0, 0), 128) == (1, 16)
    assert threats_of(Group(1, 1, 0, 0), 128) == (17, 128)
    assert threats_of(Group(0, 1, 0, 0), 300) == (1, 256)


def test_few_positions_are_decided_together_and_many_by_class() -> None:
    histogram = [0] * 130
    assert groups(histogram, [0] * 8, 128) == []
    histogram[3], histogram[40], histogram[129] = 40, 2, 7  # with 129 not all threats are known
    assert groups(histogram, [600, 90, 0, 0, 0, 0, 0, 0], 128) == [Group(0, 1, 42, 690)]
    histogram[3] = MANY
    assert groups(histogram, [600, 90, 0, 0, 0, 0, 0, 0], 128) == [Group(0, 0, MANY, 600), Group(1, 1, 2, 90)]
    histogram[3] = 0
    assert groups(histogram, [0, 90, 0, 0, 0, 0, 0, 0], 128) == [Group(1, 1, 2, 90)]


@pytest.fixture
def kernels(cuda: torch.device, native_cuda: ModuleType) -> torch.device:
    """A GPU with the CUDA kernels."""
    return cuda


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("positions", "depth", "radii"), [(0, 5, 3), (1, 0, 2), (7, 1, 1), (70, 123, 129), (3000, 4096, 17)]
)
def test_the_kernel_counts_as_its_twin(
    kernels: torch.device, positions: int, depth: int, radii: int, dtype: torch.dtype
) -> None:
    base = torch.randn(positions, depth, device=kernels).to(dtype)
    hidden = (base + 0.1 * torch.randn(positions, depth, device=kernels)).to(dtype)
    hidden[::9, depth // 2 :] = math.inf
    radius = torch.rand(positions, radii, device=kernels) * 0.2 * max(depth, 1) ** 0.5
    expected = count_threats_reference(hidden, base, radius)
    assert torch.equal(count_threats(hidden, base, radius, native_code=True), expected)
    wide = torch.zeros(positions, depth + 5, dtype=dtype, device=kernels)
    wide[:, 3 : 3 + depth] = hidden
    assert torch.equal(count_threats(wide[:, 3 : 3 + depth], base, radius, native_code=True), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_distance_is_taken_for_less_than_it_is(kernels: torch.device, dtype: torch.dtype) -> None:
    base = torch.randn(500, 77, device=kernels).to(dtype)
    hidden = (base + 0.1 * torch.randn(500, 77, device=kernels)).to(dtype)
    exact = (hidden.double() - base.double()).norm(dim=1)
    radius = torch.stack([exact, exact * (1 + 2.0**-15), torch.full_like(exact, math.nan)], 1).float()
    assert count_threats(hidden, base, radius, native_code=True).tolist() == [2] * 500


def assert_as_the_full_op(
    hidden: Tensor, lm_head: Tensor, reference: Tensor, certificate: ops.Certificate
) -> dict[str, int]:
    full = ops.token_divergence(hidden, lm_head, reference, backend="cuda")
    result = ops.token_divergence(hidden, lm_head, reference, certificate=certificate, backend="cuda")
    for name in ("mismatch", "first", "count"):
        assert torch.equal(getattr(result, name), getattr(full, name)), name
    assert sum(result.settled.values()) == reference.numel()
    return result.settled


def on_the_boundary(hidden: Tensor, lm_head: Tensor) -> Tensor:
    """Hidden [P, D] moved the shortest way to where the top token ties with its nearest one."""
    h, w = hidden.double(), lm_head.double()
    z = h @ w.T
    top = z.argmax(1)
    gap = z.gather(1, top[:, None]) - z
    distance = torch.cdist(w[top], w)
    nearest = (gap / distance).scatter(1, top[:, None], math.inf).nan_to_num(math.inf).argmin(1)
    direction = w[top] - w[nearest]
    step = gap.gather(1, nearest[:, None]) / direction.square().sum(1, keepdim=True)
    return (h - step * direction).to(hidden.dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
# Also rows that do not begin on 16 bytes, and such that do but whose copies do not.
@pytest.mark.parametrize(("depth", "between"), [(64, 0), (576, 0), (60, 0), (60, 4), (64, 3), (7, 1)])
def test_on_the_decision_boundary(
    kernels: torch.device, dtype: torch.dtype, depth: int, between: int
) -> None:
    torch.manual_seed(depth + between)
    lm_head = torch.randn(5000, depth + between, device=kernels).to(dtype)[:, :depth]
    base = torch.randn(1, 300, depth + between, device=kernels).to(dtype)[..., :depth]
    boundary = on_the_boundary(base[0], lm_head)
    certificate = ops.Certificate.build(base, lm_head, k=(2, 8, 40))
    for factor in (0.0, 0.9, 0.999, 1.0, 1.001, 1.1, 3.0):
        moved = (base.double() + factor * (boundary.double() - base.double())).to(dtype)
        hidden = torch.empty(1, 300, depth + between, device=kernels, dtype=dtype)[..., :depth]
        hidden.copy_(moved)
        for states in (base, hidden):
            reference = (states.double() @ lm_head.double().T).argmax(-1)
            assert_as_the_full_op(hidden, lm_head, reference, certificate)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_stage_is_reached(kernels: torch.device, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    lm_head = torch.randn(4000, 64, device=kernels).to(dtype)
    base = (4 * torch.randn(1, 600, 64, device=kernels)).to(dtype)
    size = torch.logspace(-4, 1.5, 600, device=kernels)[:, None]
    hidden = (base + size * torch.randn(1, 600, 64, device=kernels)).to(dtype)
    hidden[0, 599] = math.nan
    for k in ((4, 32), 1, (16, 128), (300, 3999), 5000):
        certificate = ops.Certificate.build(base, lm_head, k=k)
        for states in (base, hidden.nan_to_num()):
            reference = (states.double() @ lm_head.double().T).argmax(-1)
            settled = assert_as_the_full_op(hidden, lm_head, reference, certificate)
        if k == (4, 32):
            # On a GPU the product with all of the vocabulary is faster than the screen (ops/certified_cuda.py).
            assert settled.pop("int8 screen") == 0
            assert min(settled.values()) > 0, settled


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_rows_tie(kernels: torch.device, dtype: torch.dtype) -> None:
    lm_head = torch.randint(-3, 4, (500, 24), device=kernels).to(dtype)
    lm_head[250:] = lm_head[:250].flip(0)
    lm_head[100:110] = lm_head[7]
    base = torch.randint(-3, 4, (2, 40, 24), device=kernels).to(dtype)
    base[0, :5] = lm_head[7]
    moved = torch.randint(-1, 2, base.shape, device=kernels) * (torch.rand(2, 40, 1, device=kernels) < 0.5)
    hidden = base + moved.to(dtype)
    certificate = ops.Certificate.build(base, lm_head, k=(1, 16))
    winner = (hidden.double() @ lm_head.double().T).argmax(-1)
    for reference in (winner, 499 - winner, torch.full_like(winner, 107)):
        assert_as_the_full_op(hidden, lm_head, reference, certificate)


@pytest.mark.gpu
def test_empty_and_small(kernels: torch.device) -> None:
    lm_head = torch.randn(50, 8, device=kernels)
    for batch, length, vocabulary in ((0, 4, 50), (3, 0, 50), (0, 0, 50), (2, 3, 1), (2, 3, 2)):
        base, head = torch.randn(batch, length, 8, device=kernels), lm_head[:vocabulary]
        certificate = ops.Certificate.build(base, head)
        reference = torch.zeros(batch, length, dtype=torch.int64, device=kernels)
        assert_as_the_full_op(base + 0.01, head, reference, certificate)
        assert_as_the_full_op(-base, head, reference, certificate)


@pytest.mark.gpu
def test_the_common_case_waits_once(kernels: torch.device) -> None:
    torch.manual_seed(0)
    lm_head = torch.randn(2000, 64, device=kernels).bfloat16()
    base = (4 * torch.randn(1, 300, 64, device=kernels)).bfloat16()
    certificate = ops.Certificate.build(base, lm_head)
    hidden = (base + 0.05 * torch.randn(1, 300, 64, device=kernels)).bfloat16()
    reference = certificate.top[None]
    settled = assert_as_the_full_op(
        hidden, lm_head, reference, certificate
    )  # the reference's ids are checked
    assert settled["radius"] > 0
    assert settled["nearest 16"] > 0
    assert settled["int8 screen"] == settled["full head"] == 0
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        ops.token_divergence(hidden, lm_head, reference, certificate=certificate, backend="cuda")
    names = [event.name for event in profile.events()]
    waits = [each for each in names if each in ("aten::nonzero", "aten::item", "aten::_local_scalar_dense")]
    assert waits == []
    assert sum(name.startswith("aten::") for name in names) <= 90  # with what each is made of
