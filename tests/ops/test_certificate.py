"""A certificate answers as the full op does, wherever the hidden states are put."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dtm_fast import ops
from dtm_fast.ops import native
from dtm_fast.ops.token_divergence import CertifiedDivergence
from dtm_fast.ops.vocabulary_screen import VocabularyScreen

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def _needs_kernels() -> None:
    """The promise is one of the native kernels, which sum in one order."""
    reason = native.why_no_cpu_kernels()
    if reason is not None:
        pytest.skip(reason)


def assert_as_the_full_op(
    hidden: torch.Tensor,
    lm_head: torch.Tensor,
    reference: torch.Tensor,
    certificate: ops.Certificate,
    backend: str = "cpu",
) -> CertifiedDivergence:
    full = ops.token_divergence(hidden, lm_head, reference, backend=backend)
    result = ops.token_divergence(hidden, lm_head, reference, certificate=certificate, backend=backend)
    assert torch.equal(result.mismatch, full.mismatch)
    assert torch.equal(result.first, full.first)
    assert torch.equal(result.count, full.count)
    assert sum(result.settled.values()) == reference.numel()
    assert list(result.settled) == [
        "radius",
        *(f"nearest {k}" for k in certificate.k),
        "int8 screen",
        "full head",
    ]
    return result


def greedy(hidden: torch.Tensor, lm_head: torch.Tensor) -> torch.Tensor:
    return (hidden.double() @ lm_head.double().T).argmax(-1)


def on_the_boundary(hidden: torch.Tensor, lm_head: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden [P, D] moved the shortest way to where the top token ties with its nearest one; that one's id."""
    h, w = hidden.double(), lm_head.double()
    z = h @ w.T
    top = z.argmax(1)
    difference = w[top][:, None] - w
    gap = z.gather(1, top[:, None]) - z
    radius = (gap / difference.norm(dim=2)).scatter(1, top[:, None], math.inf).nan_to_num(math.inf)
    nearest = radius.argmin(1)
    direction = difference[torch.arange(len(h)), nearest]
    step = gap.gather(1, nearest[:, None]) / direction.square().sum(1, keepdim=True)
    return (h - step * direction).to(hidden.dtype), nearest


def beside(hidden: torch.Tensor, steps: int) -> torch.Tensor:
    """Each row with the largest of its elements moved by so many ulps."""
    moved = hidden.clone()
    largest = hidden.abs().argmax(-1, keepdim=True)
    value = hidden.gather(-1, largest)
    integer = torch.int32 if hidden.dtype == torch.float32 else torch.int16
    return moved.scatter_(-1, largest, (value.view(integer) + steps).view(hidden.dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("depth", "vocabulary"), [(1, 2), (2, 3), (3, 40), (64, 700), (576, 5000)])
def test_on_the_decision_boundary_and_one_ulp_beside_it(
    dtype: torch.dtype, depth: int, vocabulary: int
) -> None:
    positions = 60
    lm_head = torch.randn(vocabulary, depth).to(dtype)
    base = torch.randn(1, positions, depth).to(dtype)
    boundary, rival = on_the_boundary(base[0], lm_head)
    certificate = ops.Certificate.build(base, lm_head, k=(2, 8))
    for steps in (-300, -3, -1, 0, 1, 3, 300):
        hidden = beside(boundary, steps)[None]
        for reference in (greedy(base, lm_head), greedy(hidden, lm_head), rival[None]):
            assert_as_the_full_op(hidden, lm_head, reference, certificate)


def test_a_base_on_the_boundary_is_never_proved_by_radius_alone() -> None:
    lm_head = torch.randn(300, 64)
    boundary, rival = on_the_boundary(torch.randn(100, 64), lm_head)
    certificate = ops.Certificate.build(boundary[None], lm_head)
    for steps in (-1, 0, 1):
        result = assert_as_the_full_op(beside(boundary, steps)[None], lm_head, rival[None], certificate)
        assert result.settled["radius"] == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_distances_just_below_and_above_the_radius(dtype: torch.dtype) -> None:
    lm_head = torch.randn(2000, 48).to(dtype)
    base = 3 * torch.randn(1, 200, 48).to(dtype)
    boundary, _ = on_the_boundary(base[0], lm_head)
    certificate = ops.Certificate.build(base, lm_head, k=4)
    for factor in (0.5, 0.98, 0.999, 0.9999, 0.99999, 1.0, 1.00001, 1.0001, 1.01):
        hidden = (base.double() + factor * (boundary.double() - base.double())).to(dtype)
        result = assert_as_the_full_op(hidden, lm_head, greedy(base, lm_head), certificate)
        if factor == 0.5:
            assert result.settled["radius"] > 150
        if factor > 1.001 and dtype == torch.float32:  # bfloat16 rounds many back to the base's side
            assert int(result.count.sum()) > 150


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lower", [True, False])
def test_logits_that_tie_only_after_rounding(dtype: torch.dtype, lower: bool) -> None:
    # Tokens 20 and 21 with logits around 256, where bfloat16 has only every second integer.
    rows = torch.tensor([[1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 1.0]])
    lm_head = torch.cat([torch.zeros(20, 4), rows if lower else rows.flip(0)]).to(dtype)
    base = torch.tensor([[[256.0, 256.0, 64.0, 0.0]]], dtype=dtype)
    certificate = ops.Certificate.build(base, lm_head, k=1)
    for first in range(-4, 9):
        for second in (-3, 0, 1, 2, 3):
            hidden = torch.tensor([[[256.0, 256.0, first, second]]]).to(dtype)
            for token in (20, 21, 3):
                assert_as_the_full_op(hidden, lm_head, torch.full((1, 1), token), certificate)


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_rows_tie(backend: str, dtype: torch.dtype) -> None:
    lm_head = torch.randint(-3, 4, (500, 24)).to(dtype)
    lm_head[250:] = lm_head[:250].flip(0)
    lm_head[100:110] = lm_head[7]
    base = torch.randint(-3, 4, (2, 40, 24)).to(dtype)
    base[0, :5] = lm_head[7]
    hidden = base + torch.randint(-1, 2, base.shape).to(dtype) * (torch.rand(2, 40, 1) < 0.5)
    certificate = ops.Certificate.build(base, lm_head, k=(1, 16))
    winner = greedy(hidden, lm_head)
    for reference in (winner, 499 - winner, torch.full_like(winner, 107), greedy(base, lm_head)):
        assert_as_the_full_op(hidden, lm_head, reference, certificate, backend)


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_change_and_huge_changes(dtype: torch.dtype) -> None:
    lm_head, base = torch.randn(3000, 96).to(dtype), torch.randn(3, 50, 96).to(dtype)
    reference = greedy(base, lm_head)
    reference[0, ::7] = 5
    certificate = ops.Certificate.build(base, lm_head)
    same = assert_as_the_full_op(base, lm_head, reference, certificate)
    assert same.settled["radius"] >= 140
    assert same.settled["int8 screen"] == same.settled["full head"] == 0
    for size in (1e-30, 1e-6, 1e-3, 0.1, 1.0, 10.0, 1e6, 1e30, 3e38):
        hidden = (base.double() + size * torch.randn(base.shape, dtype=torch.float64)).clamp(-3e38, 3e38)
        assert_as_the_full_op(hidden.to(dtype), lm_head, reference, certificate)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_goes_to_the_full_head(dtype: torch.dtype, value: float) -> None:
    lm_head, base = torch.randn(300, 32).to(dtype), torch.randn(2, 9, 32).to(dtype)
    certificate = ops.Certificate.build(base, lm_head)
    reference = greedy(base, lm_head)
    reference[1, 4] = 0
    hidden = base.clone()
    hidden[0, 3, 2] = hidden[1, 4, 0] = value
    assert assert_as_the_full_op(hidden, lm_head, reference, certificate).settled["full head"] == 2
    bad_base = ops.Certificate.build(hidden, lm_head)
    assert_as_the_full_op(hidden, lm_head, reference, bad_base)
    assert_as_the_full_op(base, lm_head, reference, bad_base)
    for rows in ([0], [5, 299]):
        bad_head = lm_head.clone()
        bad_head[rows, 3] = value
        assert_as_the_full_op(base, bad_head, reference, ops.Certificate.build(base, bad_head))


def test_logits_that_overflow_or_underflow() -> None:
    sizes = ((1e19, 1e19), (1e20, 1.0), (1e38, 1e-38), (1e-20, 1e-20), (1e-30, 1e-30), (1e-40, 1.0))
    for head_size, hidden_size in sizes:
        lm_head, base = head_size * torch.randn(200, 32), hidden_size * torch.randn(1, 30, 32)
        certificate = ops.Certificate.build(base, lm_head, k=3)
        for factor in (0.0, 0.01, 1.0):
            hidden = base + factor * hidden_size * torch.randn(1, 30, 32)
            reference = torch.nn.functional.linear(hidden, lm_head).argmax(-1)
            assert_as_the_full_op(hidden, lm_head, reference, certificate)
    # The squares of the weights overflow, not the logits: no radius is known.
    lm_head, base = 1e20 + 1e19 * torch.rand(200, 1), torch.ones(1, 1, 1)
    certificate = ops.Certificate.build(base, lm_head, k=3)
    assert_as_the_full_op(-base, lm_head, (lm_head * -1).argmax(0)[None], certificate)
    # Below the radius, but both logits become infinite, and the lower id wins.
    lm_head, base = torch.tensor([[0.9e10], [1e10]]), torch.tensor([[[2e28]]])
    certificate = ops.Certificate.build(base, lm_head)
    assert assert_as_the_full_op(1.95 * base, lm_head, torch.tensor([[1]]), certificate).count.item() == 1


def assert_excludes_no_winner(
    hidden: torch.Tensor, lm_head: torch.Tensor, token: torch.Tensor
) -> torch.Tensor:
    """Where the screen says that a token cannot win against `token`, its rounded logit is smaller."""
    screen = VocabularyScreen.build(lm_head)
    assert screen is not None
    assert bool(screen.covers(hidden).all())
    rivals = screen.rivals(hidden, lm_head, token)
    logits = (hidden.double() @ lm_head.double().T).float().to(hidden.dtype)
    assert not bool((logits >= logits.gather(1, token[:, None]))[~rivals].any())
    return rivals


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_screen_excludes_no_token_that_could_win(dtype: torch.dtype) -> None:
    lm_head = torch.randn(5000, 100).to(dtype)
    lm_head[:, 3] *= 20  # outliers make the quantization coarse
    hidden, _ = on_the_boundary(torch.randn(40, 100).to(dtype), lm_head)
    rivals = assert_excludes_no_winner(hidden, lm_head, greedy(hidden, lm_head))
    assert rivals.float().mean() < 0.2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("coarse", ["hidden", "lm_head", "both"])
def test_the_screen_where_quantization_scrambles_the_order(dtype: torch.dtype, coarse: str) -> None:
    # Whole numbers up to 127 lose nothing. In few dimensions the bound is nearly met.
    for depth in (2, 3, 8):
        whole_hidden = torch.randint(-120, 121, (50, depth)).float()
        whole_head = (torch.tensor([[60.0] * depth]) + torch.randint(-2, 3, (3000, depth))).clamp(-127, 127)
        whole_hidden[:, 0] = whole_head[:, 0] = 127
        hidden = whole_hidden + (torch.rand(50, depth) - 0.5) * (coarse != "lm_head")
        lm_head = whole_head + (torch.rand(3000, depth) - 0.5) * (coarse != "hidden")
        hidden[:, 0] = lm_head[:, 0] = 127
        hidden, lm_head = hidden.to(dtype), lm_head.to(dtype)
        order = (hidden.double() @ lm_head.double().T).argsort(1)
        for rank in (2999, 2990, 1500):
            assert_excludes_no_winner(hidden, lm_head, order[:, rank])


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_screen_excludes_only_what_is_out_of_reach(dtype: torch.dtype) -> None:
    lm_head, hidden = torch.randn(3000, 64).to(dtype), torch.randn(30, 64).to(dtype)
    token, reach = greedy(hidden, lm_head), 0.5 * torch.rand(30)
    screen = VocabularyScreen.build(lm_head)
    rivals = screen.rivals(hidden, lm_head, token, reach)
    # The hidden state moved by so much straight towards each token.
    logits, weight = hidden.double() @ lm_head.double().T, lm_head.double()
    nearest = logits + reach[:, None].double() * torch.cdist(weight[token], weight)
    assert not bool((nearest >= logits.gather(1, token[:, None]))[~rivals].any())
    assert bool(rivals[screen.rivals(hidden, lm_head, token)].all())
    assert rivals.float().mean() < 0.5


def test_the_screen_knows_what_ties_in_bfloat16() -> None:
    # Nothing is lost in int8: logits 256, 257, 258 and 250, of which 257 rounds to 256.
    hidden = torch.tensor([[127.0, 1.0, 1.0]]).bfloat16()
    lm_head = torch.tensor([[1.0, each, 127.0] for each in (2, 3, 4, -40)]).bfloat16()
    for token, expected in ((1, [True, True, True, False]), (2, [True, True, True, False])):
        rivals = assert_excludes_no_winner(hidden, lm_head, torch.tensor([token]))
        assert rivals[0].tolist() == expected


def test_every_stage_is_reached() -> None:
    # A geometric ladder of changes: from none to another text.
    lm_head, base = torch.randn(4000, 64), 4 * torch.randn(1, 300, 64)
    certificate = ops.Certificate.build(base, lm_head, k=(4, 32))
    size = torch.logspace(-4, 1.5, 300)[:, None]
    hidden = base + size * torch.randn(1, 300, 64)
    hidden[0, 299] = math.nan
    result = assert_as_the_full_op(hidden, lm_head, greedy(base, lm_head), certificate)
    assert min(result.settled.values()) > 0


def test_the_answer_does_not_depend_on_the_isa_or_the_threads(isas: tuple[str, ...], threads: None) -> None:
    lm_head, base = torch.randn(900, 64), torch.randn(2, 60, 64)
    hidden = base + 0.3 * torch.randn(2, 60, 64)
    certificate = ops.Certificate.build(base, lm_head, k=(2, 8))
    reference = greedy(base, lm_head)
    for isa in isas:
        for count in (1, 2):
            torch.set_num_threads(count)
            with native.use_cpu_isa(isa):
                assert_as_the_full_op(hidden, lm_head, reference, certificate)


def test_reduced_precision_of_torch_does_not_reach_the_proofs() -> None:
    lm_head = torch.randn(300, 64)
    boundary, rival = on_the_boundary(torch.randn(50, 64), lm_head)
    base = torch.randn(1, 50, 64)
    plain = ops.Certificate.build(base, lm_head, k=4)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        reduced = ops.Certificate.build(base, lm_head, k=4)
        certificate = ops.Certificate.build(boundary[None], lm_head, k=4)
        for steps in (-1, 0, 1):
            assert_as_the_full_op(beside(boundary, steps)[None], lm_head, rival[None], certificate)
    finally:
        torch.set_float32_matmul_precision(before)
    # What is to be noticed are bfloat16 products, 2^-8; float32 sums may differ between matrix libraries.
    torch.testing.assert_close(reduced.radius, plain.radius, atol=1e-4, rtol=1e-4)


def test_empty_and_strided() -> None:
    lm_head, base = torch.randn(50, 40)[:, ::2], torch.randn(3, 8, 40)[..., ::2]
    for batch, length in ((3, 4), (0, 4), (3, 0), (0, 0)):
        part = base[:batch, ::2][:, :length]
        certificate = ops.Certificate.build(part, lm_head)
        assert_as_the_full_op(part, lm_head, greedy(part, lm_head), certificate)
    no_depth = torch.zeros(2, 3, 0)
    certificate = ops.Certificate.build(no_depth, lm_head[:, :0])
    assert_as_the_full_op(no_depth, lm_head[:, :0], torch.tensor([[0, 1, 0], [0, 0, 2]]), certificate)


def test_wrong_arguments() -> None:
    lm_head, base = torch.randn(50, 8), torch.randn(2, 4, 8)
    reference = greedy(base, lm_head)
    certificate = ops.Certificate.build(base, lm_head)
    with pytest.raises(TypeError, match=r"hidden: expected dtype torch.float32 or torch.bfloat16"):
        ops.Certificate.build(base.half(), lm_head.half())
    with pytest.raises(ValueError, match=r"lm_head: expected size 8 in dimension 1 \(D of hidden\)"):
        ops.Certificate.build(base, lm_head[:, :7])
    with pytest.raises(ValueError, match=r"lm_head: expected at least one token"):
        ops.Certificate.build(base, lm_head[:0])
    with pytest.raises(TypeError, match=r"k: expected a whole number or several, got 2.5"):
        ops.Certificate.build(base, lm_head, k=2.5)  # type: ignore[arg-type]
    for k in (0, (), (4, -1)):
        with pytest.raises(ValueError, match=r"k: expected at least one number, each at least 1"):
            ops.Certificate.build(base, lm_head, k=k)
    with pytest.raises(ValueError, match=r"certificate: built for hidden \[2, 4, 8\] of torch.float32, got"):
        ops.token_divergence(base[:1], lm_head, reference[:1], certificate=certificate)
    with pytest.raises(ValueError, match=r"certificate: built for another lm_head"):
        ops.token_divergence(base, lm_head.clone(), reference, certificate=certificate)
    with pytest.raises(TypeError, match=r"certificate: expected a Certificate or None, got str"):
        ops.token_divergence(base, lm_head, reference, certificate="base")  # type: ignore[call-overload]
    lm_head[0] = 0
    with pytest.raises(ValueError, match=r"certificate: lm_head was changed in place"):
        ops.token_divergence(base, lm_head, reference, certificate=certificate)


@pytest.mark.once
def test_in_a_compiled_function() -> None:
    lm_head, base = torch.randn(50, 8), torch.randn(2, 4, 8)
    certificate = ops.Certificate.build(base, lm_head)

    @torch.compile(backend="eager")
    def count(hidden: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        return ops.token_divergence(hidden + 0, lm_head, reference, certificate=certificate).count + 1

    assert count(base, greedy(base, lm_head)).tolist() == [1, 1]


@settings(deadline=None, max_examples=150)
@given(
    shape=st.tuples(st.integers(0, 3), st.integers(0, 9), st.integers(1, 600), st.integers(0, 40)),
    dtype=st.sampled_from(DTYPES),
    k=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    size=st.sampled_from([0.0, 1e-6, 1e-3, 0.03, 0.3, 1.0, 100.0]),
    integers=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_case(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    k: list[int],
    size: float,
    integers: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    batch, length, vocabulary, depth = shape
    base, lm_head = torch.randn(batch, length, depth), torch.randn(vocabulary, depth)
    if integers:  # many ties
        base, lm_head = base.round(), lm_head.round()
    base, lm_head = base.to(dtype), lm_head.to(dtype)
    hidden = (base + size * torch.randn(base.shape)).to(dtype)
    certificate = ops.Certificate.build(base, lm_head, k=k)
    for reference in (
        greedy(base, lm_head),
        greedy(hidden, lm_head),
        torch.randint(vocabulary, base.shape[:2]),
    ):
        assert_as_the_full_op(hidden, lm_head, reference, certificate)
