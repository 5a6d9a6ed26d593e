"""The CUDA kernels of token_divergence against exact logits, each kernel by itself."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dtm_fast import ops
from dtm_fast.ops.token_divergence import mismatch_and_nll_cuda

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("native_cuda")]

DTYPES = [torch.float32, torch.bfloat16]
# T, D, V
SHAPES = [
    (1, 1, 1), (1, 64, 5003), (7, 16, 7), (33, 123, 1000), (64, 576, 49152), (65, 64, 129), (128, 128, 256),
    (129, 80, 257), (200, 513, 5000), (1000, 256, 32000), (3000, 64, 300),
]  # fmt: skip


def kernels_for(depth: int, dtype: torch.dtype) -> list[str]:
    hopper = dtype == torch.bfloat16 and depth % 8 == 0 and torch.cuda.get_device_capability() == (9, 0)
    return ["best", "mma", "hopper"] if hopper else ["best", "mma"]


def whole(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Small whole numbers, of which every order of summation gives the same sum."""
    return torch.randint(-2, 3, shape, device=device).to(dtype)


def expected_of(logits: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """From logits in their dtype: the mismatch, the lowest id winning, and the nll in float64."""
    top = (logits == logits.amax(1, keepdim=True)).int().argmax(1)
    wide = logits.double()
    return top != reference, wide.logsumexp(1) - wide.gather(1, reference[:, None])[:, 0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_ties_go_to_the_lowest_id(cuda, shape, dtype):
    tokens, depth, vocabulary = shape
    hidden = whole(tokens, depth, dtype=dtype, device=cuda)
    head = whole(vocabulary, depth, dtype=dtype, device=cuda)
    logits = F.linear(hidden.double(), head.double()).to(dtype)
    reference = (logits == logits.amax(1, keepdim=True)).int().argmax(1)
    reference[::3] = torch.randint(0, vocabulary, reference[::3].shape, device=cuda)
    mismatch, nll = expected_of(logits, reference)
    for kernel in kernels_for(depth, dtype):
        found, found_nll = mismatch_and_nll_cuda(hidden, head, reference, kernel)
        assert torch.equal(found, mismatch), kernel
        assert torch.allclose(found_nll.double(), nll, rtol=1e-5, atol=1e-5), kernel


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_random_logits(cuda, shape, dtype):
    tokens, depth, vocabulary = shape
    hidden = torch.randn(tokens, depth, device=cuda).to(dtype)
    head = (torch.randn(vocabulary, depth, device=cuda) / depth**0.5).to(dtype)
    exact = F.linear(hidden.double(), head.double())
    reference = exact.argmax(1)
    top = exact.topk(min(2, vocabulary)).values
    near = torch.zeros_like(reference, dtype=torch.bool)
    if vocabulary > 1:
        near = (top[:, 0] - top[:, 1]) <= top[:, 0].abs() * (2.0**-7 if dtype == torch.bfloat16 else 2.0**-18)
    nll = exact.logsumexp(1) - top[:, 0]
    for kernel in kernels_for(depth, dtype):
        mismatch, found_nll = mismatch_and_nll_cuda(hidden, head, reference, kernel)
        assert not (mismatch & ~near).any(), kernel
        tolerance = 2.0**-7 if dtype == torch.bfloat16 else 2.0**-18
        assert float(((found_nll - nll).abs() / (1 + top[:, 0].abs() + nll)).max()) <= tolerance, kernel


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_logits_that_are_not_finite(cuda, value, dtype):
    hidden = torch.ones(70, 64, dtype=dtype, device=cuda)
    head = torch.randn(1000, 64, device=cuda).to(dtype)
    head[300, 5], head[700, 6] = value, value
    reference = torch.full((70,), 300, device=cuda)
    reference[1::2] = 999
    logits = F.linear(hidden.double(), head.double())
    mismatch = logits.argmax(1) != reference  # torch takes the first NaN as the largest, too
    nll = (logits.logsumexp(1) - logits.gather(1, reference[:, None])[:, 0]).float()
    for kernel in kernels_for(64, dtype):
        found, found_nll = mismatch_and_nll_cuda(hidden, head, reference, kernel)
        assert torch.equal(found, mismatch), kernel
        assert torch.equal(found_nll.isnan(), nll.isnan()), kernel
        assert torch.equal(found_nll.isinf(), nll.isinf()), kernel


@pytest.mark.parametrize("kernel", ["mma", "hopper"])
def test_a_row_does_not_depend_on_the_others(cuda, kernel):
    if kernel == "hopper" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("compute capability 9.0 is needed")
    hidden = torch.randn(300, 256, device=cuda).bfloat16()
    head = torch.randn(3000, 256, device=cuda).bfloat16()
    reference = torch.randint(0, 3000, (300,), device=cuda)
    whole_mismatch, whole_nll = mismatch_and_nll_cuda(hidden, head, reference, kernel)
    for part in (slice(0, 1), slice(7, 90), slice(131, None)):
        mismatch, nll = mismatch_and_nll_cuda(hidden[part], head, reference[part], kernel)
        assert torch.equal(mismatch, whole_mismatch[part])
        assert torch.equal(nll, whole_nll[part])


def test_rows_taken_in_parts(cuda, monkeypatch):
    hidden, head = torch.randn(700, 64, device=cuda).bfloat16(), torch.randn(1000, 64, device=cuda).bfloat16()
    reference = torch.randint(0, 1000, (700,), device=cuda)
    expected = mismatch_and_nll_cuda(hidden, head, reference)
    monkeypatch.setitem(mismatch_and_nll_cuda.__globals__, "_SUMMARIES", 2048)
    found = mismatch_and_nll_cuda(hidden, head, reference)
    assert all(torch.equal(ours, other) for ours, other in zip(found, expected, strict=True))


def test_its_memory_is_bounded(cuda):
    hidden, head = (torch.randn(rows, 256, device=cuda).bfloat16() for rows in (4096, 128_256))
    reference = torch.randint(0, 128_256, (1, 4096), device=cuda)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    ops.token_divergence(hidden[None], head, reference, backend="cuda")
    assert torch.cuda.max_memory_allocated() - before <= 64 * 2**20


def test_views(cuda):
    hidden, head = torch.randn(90, 70, device=cuda).bfloat16(), torch.randn(400, 75, device=cuda).bfloat16()
    reference = torch.randint(0, 400, (45,), device=cuda)
    for offset in (0, 1, 5):
        views = hidden[::2, 2:66], head[:, offset : offset + 64]
        expected = mismatch_and_nll_cuda(*(each.contiguous() for each in views), reference, "mma")
        found = mismatch_and_nll_cuda(*views, reference)
        assert torch.equal(found[0], expected[0])
        assert torch.allclose(found[1], expected[1], rtol=1e-5, atol=1e-5)
