"""The head decides as the full logits do, whatever it proves instead of computing."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dtm_fast.errors import MeasurementError
from dtm_fast.measure.forward import choice, lead, negative_log_likelihood
from dtm_fast.measure.head import Decisions, Head
from dtm_fast.ops import native

DTYPES = [torch.float32, torch.bfloat16]
SEEDS = st.integers(0, 2**32 - 1)
MOVES = st.sampled_from([0.0, 0.01, 0.1, 1.0, 10.0])


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def whole(*shape: int, seed: int, most: int = 8) -> Tensor:
    """Whole numbers: their products and sums are exact in float32, in any order."""
    return torch.randint(-most, most + 1, shape, generator=torch.Generator().manual_seed(seed)).float()


def logits_of(hidden: Tensor, weight: Tensor) -> Tensor:
    return (hidden.double() @ weight.double().T).to(weight.dtype)


def head_of(weight: Tensor, base: Tensor) -> tuple[Head, Tensor]:
    reference = choice(logits_of(base, weight))
    return Head(weight, base, reference), reference


def moved_differently(
    shape: tuple[int, int], moves: list[float], dtype: torch.dtype, seed: int
) -> tuple[Head, Tensor]:
    """A head of `shape` and states [5, 4, D], each so far from its base's; only where decisions have the same bits."""
    if reason := native.why_no_cpu_kernels():
        pytest.skip(f"only the kernels sum in one order: {reason}")
    weight, base = drawn(*shape, seed=seed).to(dtype), drawn(5, 4, shape[1], seed=seed + 1)
    change = torch.tensor(moves).view(5, 4, 1) * drawn(5, 4, shape[1], seed=seed + 2)
    return head_of(weight, base.to(dtype))[0], (base + change).to(dtype)


def bits(decisions: Decisions) -> list[Tensor]:
    return [decisions.mismatch, decisions.certain, decisions.lead.view(torch.int32)]


def assert_as_the_logits_say(decisions: Decisions, logits: Tensor, reference: Tensor) -> None:
    """To the bit."""
    assert torch.equal(decisions.mismatch, choice(logits) != reference)
    known = ~decisions.lead.isnan()
    assert torch.equal(decisions.lead[known], lead(logits, reference)[known])
    assert torch.equal(known, decisions.mismatch)
    assert bool(decisions.certain.all())


@settings(deadline=None, max_examples=150)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(2, 300), st.integers(1, 40)),
    moved=st.sampled_from([0, 1, 8]),
    share=st.sampled_from([0.05, 0.5, 1.0]),
    dtype=st.sampled_from(DTYPES),
    anything=st.booleans(),
    seed=SEEDS,
)
def test_decisions_are_those_of_the_full_logits_and_ties_go_to_the_lowest_id(
    shape, moved, share, dtype, anything, seed
):
    P, N, V, D = shape  # noqa: N806
    weight, base = whole(V, D, seed=seed).to(dtype), whole(P, N, D, seed=seed + 1)
    change = whole(P, N, D, seed=seed + 2, most=moved) * (drawn(P, N, D, seed=seed + 3).abs() < share)
    hidden, base = (base + change).to(dtype), base.to(dtype)
    head, reference = head_of(weight, base)
    if anything:  # not even the base chooses these
        reference = torch.randint(0, V, (P, N), generator=torch.Generator().manual_seed(seed))
        head = Head(weight, base, reference)
    assert_as_the_logits_say(head.decide(hidden, range(P), 0), logits_of(hidden, weight), reference)


@pytest.mark.parametrize("vocabulary", [2, 3, 15, 16, 17, 101, 700])
def test_on_any_numbers_the_decisions_are_those_of_torch(vocabulary):
    weight, base = drawn(vocabulary, 24), drawn(4, 50, 24, seed=1)
    head, reference = head_of(weight, base)
    matches = 0
    for move in (0.01, 0.1, 0.5, 3.0):
        hidden = base + move * drawn(4, 50, 24, seed=2)
        logits = F.linear(hidden, weight)
        leads, found = lead(logits, reference), head.decide(hidden, range(4), 0)
        clear = leads.abs() > 1e-4  # torch sums in another order
        assert int(clear.sum()) >= 198
        assert torch.equal(found.mismatch[clear], (choice(logits) != reference)[clear])
        known = ~found.lead.isnan()
        # Differences of two logits up to 80, each off by two steps of float32 at most: torch sums in another order.
        torch.testing.assert_close(found.lead[known], leads[known], rtol=0, atol=4 * 2.0**-17)
        assert torch.equal(known, found.mismatch)
        matches += int((~found.mismatch).sum())
    assert 0 < matches < 800  # otherwise equality would say little


def test_logits_that_are_equal_once_they_are_rounded_are_a_tie():
    weight = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.bfloat16)
    base = torch.tensor([[[264.0, 256.0], [256.0, 264.0]]], dtype=torch.bfloat16)
    head, reference = head_of(weight, base)
    assert reference.tolist() == [[1, 0]]
    tied = torch.full((1, 2, 2), 256.0, dtype=torch.bfloat16)
    found = head.decide(tied, [0], 0)
    assert (found.mismatch.tolist(), found.lead.tolist()[0][0]) == ([[True, False]], 0.0)
    # 257 and 256 are one number in bfloat16: the lowest id wins, though it is the smaller sum.
    weight = torch.tensor([[256.0, 0.0], [256.0, 1.0]], dtype=torch.bfloat16)
    head, reference = head_of(weight, torch.tensor([[[1.0, 8.0]]], dtype=torch.bfloat16))
    found = head.decide(torch.ones(1, 1, 2, dtype=torch.bfloat16), [0], 0)
    assert (reference.item(), found.mismatch.item(), found.lead.item()) == (1, True, 0.0)


@settings(deadline=None, max_examples=60)
@given(
    rows=st.lists(st.integers(0, 4), min_size=1, max_size=7),
    columns=st.tuples(st.integers(0, 5), st.integers(1, 6)),
    move=st.sampled_from([0, 1, 8]),
    dtype=st.sampled_from(DTYPES),
    seed=SEEDS,
)
def test_rows_and_first_say_which_positions_these_are(rows, columns, move, dtype, seed):
    first, count = columns[0], min(columns[1], 6 - columns[0])
    weight, base = whole(150, 12, seed=seed).to(dtype), whole(5, 6, 12, seed=seed + 1).to(dtype)
    hidden = base + whole(5, 6, 12, seed=seed + 2, most=move).to(dtype)
    head, reference = head_of(weight, base)
    part = hidden[rows, first : first + count]
    found = head.decide(part, rows, first)
    assert found.mismatch.shape == found.certain.shape == found.lead.shape == (len(rows), count)
    wanted = reference[rows, first : first + count]
    assert_as_the_logits_say(found, logits_of(part, weight), wanted)


@settings(deadline=None, max_examples=60)
@given(
    shape=st.tuples(st.integers(2, 300), st.integers(1, 40)),
    moves=st.lists(MOVES, min_size=20, max_size=20),
    chosen=st.lists(st.integers(0, 4), min_size=1, max_size=4, unique=True),
    columns=st.tuples(st.integers(0, 3), st.integers(1, 4)),
    dtype=st.sampled_from(DTYPES),
    error=st.sampled_from([0.0, 0.05]),
    seed=SEEDS,
)
def test_a_decision_has_the_same_bits_in_any_company(shape, moves, chosen, columns, dtype, error, seed):
    head, hidden = moved_differently(shape, moves, dtype, seed)
    first, stop = columns[0], min(sum(columns), 4)
    everyone = bits(head.decide(hidden, range(5), 0, error))
    few = bits(head.decide(hidden[chosen, first:stop], chosen, first, error))
    for all_of_them, some in zip(everyone, few, strict=True):
        assert torch.equal(all_of_them[chosen, first:stop], some)


@settings(deadline=None, max_examples=100)
@given(
    shape=st.tuples(st.integers(2, 300), st.integers(1, 40)),
    moves=st.lists(MOVES, min_size=20, max_size=20),
    dtype=st.sampled_from(DTYPES),
    errors=st.lists(st.sampled_from([0.0, 0.01, 0.3]), min_size=5, max_size=5),
    seed=SEEDS,
)
def test_up_to_the_first_certain_mismatch_and_one_by_one_decisions_have_the_same_bits(
    shape, moves, dtype, errors, seed
):
    head, hidden = moved_differently(shape, moves, dtype, seed)
    for probe, error in enumerate(errors):
        everything = head.decide(hidden[[probe]], [probe], 0, error)
        sure = (everything.mismatch & everything.certain)[0]
        end = int(sure.int().argmax()) + 1 if bool(sure.any()) else 4
        wanted = head.decide(hidden[[probe]], [probe], 0, error, until_mismatch=True)
        single = head.decide_at(hidden[probe, :end], [probe] * end, range(end), [error] * end)
        for all_of_them, first, alone in zip(bits(everything), bits(wanted), bits(single), strict=True):
            assert torch.equal(all_of_them[0, :end], first[0, :end])
            assert torch.equal(all_of_them[0, :end], alone)


def test_many_rows_up_to_their_first_certain_mismatch_need_fewer_decisions_of_the_whole_vocabulary(
    monkeypatch,
):
    weight, base = drawn(2000, 24), drawn(6, 40, 24, seed=1)
    hidden, (head, _) = base + 0.5 * drawn(6, 40, 24, seed=2), head_of(weight, base)
    looked_at = []
    screened = Head._screened
    monkeypatch.setattr(
        Head,
        "_screened",
        lambda self, rows, some: (looked_at.append(len(some)), screened(self, rows, some))[1],
    )
    everything = head.decide(hidden, range(6), 0, 0.01)
    wanted = head.decide(hidden, range(6), 0, 0.01, until_mismatch=True)
    sure = everything.mismatch & everything.certain
    before = sure.cumsum(1) - sure.int() == 0
    assert torch.equal(wanted.mismatch[before], everything.mismatch[before])
    assert 0 < looked_at[1] <= int(before.sum()) < looked_at[0]


@pytest.mark.parametrize("seed", [84, 108, 109])
def test_how_certain_a_decision_is_depends_on_no_other(seed):
    # Seeds with a decision that a bound over the tokens of all rows together would call uncertain.
    if reason := native.why_no_cpu_kernels():
        pytest.skip(f"only the kernels sum in one order: {reason}")
    weight, base = drawn(2000, 24, seed=seed), drawn(6, 8, 24, seed=seed + 10000)
    moves = torch.tensor([0.02, 0.05, 0.1, 0.2, 0.4, 0.8]).view(6, 1, 1)
    hidden, (head, _) = base + moves * drawn(6, 8, 24, seed=seed + 20000), head_of(weight, base)
    everyone = head.decide(hidden, range(6), 0, 0.2).certain
    alone = [head.decide(hidden[[probe]], [probe], 0, 0.2).certain for probe in range(6)]
    assert torch.equal(everyone, torch.cat(alone))
    assert 0 < int(everyone.sum()) < 48


def distance_to_the_border(hidden: Tensor, weight: Tensor, reference: Tensor) -> Tensor:
    """How far hidden [..., D] must move at least until the reference wins or loses, float64; 0 never moves."""
    z, w = hidden.double() @ weight.double().T, weight.double()
    ahead = z.gather(-1, reference[..., None]) - z
    apart = (w[reference][..., None, :] - w).norm(dim=-1)
    return (ahead / apart).nan_to_num(nan=torch.inf).amin(-1).abs()


@pytest.mark.parametrize("vocabulary", [2, 32, 302])
def test_what_is_nearer_to_the_border_than_the_error_is_not_certain(vocabulary):
    weight = torch.zeros(vocabulary, 3)
    weight[0, 0] = weight[1, 1] = 1
    weight[2:, 0] = -torch.linspace(0.5, 1, vocabulary - 2)  # far from winning
    base, error = torch.tensor([1.0, 0, 0]).expand(1, 8, 3), 0.01
    head, reference = head_of(weight, base)
    hidden = torch.zeros(1, 8, 3)
    hidden[..., 2] = 10.0  # far from the base, along the border
    signed = torch.tensor([-0.5, -0.102, -0.098, -0.001, 0.001, 0.098, 0.102, 0.5])
    hidden[0, :, 0], hidden[0, :, 1] = 1 + signed / 2**0.5, 1 - signed / 2**0.5
    reach = error * (hidden - base).double().norm(dim=2)
    expected = distance_to_the_border(hidden, weight, reference) > reach
    assert expected.tolist() == [[True, True, False, False, False, False, True, True]]
    found = head.decide(hidden, [0], 0, error)
    assert torch.equal(found.certain, expected)
    assert found.mismatch.tolist() == [[True] * 4 + [False] * 4]
    assert bool(head.decide(hidden, [0], 0).certain.all())


@pytest.mark.parametrize("vocabulary", [2, 9, 16])
@pytest.mark.parametrize("error", [0.01, 0.2])
def test_on_any_numbers_certain_is_what_the_distances_say(vocabulary, error):
    weight, base = drawn(vocabulary, 12), drawn(3, 200, 12, seed=1)
    head, reference = head_of(weight, base)
    hidden = base + drawn(3, 200, 1, seed=2).abs() * drawn(3, 200, 12, seed=3)
    distance = distance_to_the_border(hidden, weight, reference)
    reach = error * (hidden - base).double().norm(dim=2)
    clear = (distance - reach).abs() > 1e-4
    found = head.decide(hidden, range(3), 0, error)
    assert torch.equal(found.certain[clear], (distance > reach)[clear])
    assert 0 < int((~found.certain).sum()) < 500


@pytest.mark.parametrize("scale", [1.0, 6.0])
def test_of_many_tokens_none_within_the_error_is_overlooked(scale):
    weight = drawn(500, 12) * torch.linspace(1, scale, 500)[:, None]
    base = drawn(3, 200, 12, seed=1)
    head, reference = head_of(weight, base)
    hidden = base + drawn(3, 200, 1, seed=2).abs() * drawn(3, 200, 12, seed=3)
    distance = distance_to_the_border(hidden, weight, reference)
    reach = 0.1 * (hidden - base).double().norm(dim=2)
    found = head.decide(hidden, range(3), 0, 0.1)
    assert bool((distance > reach - 1e-4)[found.certain].all())
    assert int(found.certain.sum()) > 300


@pytest.mark.parametrize("company", [20, 300])
def test_a_near_border_behind_sixteen_far_ones_of_larger_logits_is_seen(company):
    # Token 1 is nearly 20 away from token 0, so that its logit, though 0.2 behind, is within reach; the others are
    # only 0.1 behind, but all but equal to token 0.
    weight = torch.zeros(2 + company, 3)
    weight[0, 0] = weight[1, 1] = 1
    weight[1] = torch.tensor([0.0, 20.0, 0])
    weight[2:, 0] = 1 - torch.linspace(0.01, 0.011, company)
    base = torch.tensor([10.0, 0, 0]).expand(1, 2, 3)
    head, _ = head_of(weight, base)
    hidden = torch.tensor([[[10.0, 0.49, 0], [0.001, 0, 0]]])  # the second makes all others looked at
    if company > 128:
        hidden[..., 2] = 20.0  # so far away that all logits are made
    found = head.decide(hidden, [0], 0, 0.05)
    assert (found.mismatch.tolist(), found.certain[0, 0].item()) == ([[False, False]], False)


def test_a_tie_of_the_base_itself_is_certain_in_any_company():
    weight, base = torch.eye(2), torch.tensor([[[1.0, 1.0], [2.0, 1.0]]])
    head, _ = head_of(weight, base)
    hidden = base + torch.tensor([[[0.0, 0.0], [-0.6, 0.5]]])
    assert head.decide(hidden, [0], 0, 0.1).certain[0, 0].item()
    assert head.decide(hidden[:, :1], [0], 0, 0.1).certain.item()


@pytest.mark.once
def test_a_mismatch_by_a_token_of_another_row_is_not_certain_before_all_are_looked_at():
    weight, base = drawn(3000, 96), drawn(1, 200, 96, seed=1)
    hidden = drawn(1, 200, 96, seed=2)  # so far away that all of the vocabulary may win
    two = (hidden @ weight.T).topk(2, dim=-1)
    best, reference = two.indices.unbind(-1)
    across = weight[best] - weight[reference]
    width = across.norm(dim=-1, keepdim=True)
    # Just on the side of the token that wins: nothing is certain.
    hidden = hidden - across / width * (0.999 * (two.values[..., :1] - two.values[..., 1:]) / width)
    head = Head(weight, base, reference)
    for until_mismatch in (False, True):
        found = head.decide(hidden, [0], 0, error=0.003, until_mismatch=until_mismatch)
        assert not (found.mismatch & found.certain).any()
    exact = head.decide(hidden, [0], 0, until_mismatch=True)
    assert bool(exact.mismatch[0, 0] & exact.certain[0, 0])
    assert float(exact.lead[0, 0]) < 0


@pytest.mark.once
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [2.0**-80, 2.0**-30, 2.0**66])
def test_what_is_certain_does_not_depend_on_the_scale_of_the_states(scale, dtype):
    weight, base = drawn(300, 16).to(dtype), drawn(2, 40, 16, seed=1).to(dtype)
    hidden = (base + 0.5 * drawn(2, 40, 16, seed=2)).to(dtype)
    expected = head_of(weight, base)[0].decide(hidden, range(2), 0, 0.05)
    assert not expected.certain.all()
    assert expected.mismatch.any()
    found = head_of(weight, base * scale)[0].decide(hidden * scale, range(2), 0, 0.05)
    assert torch.equal(found.mismatch, expected.mismatch)
    # Bounds are enlarged by what rounding may be, which differs in what is next to denormal.
    assert (found.certain != expected.certain).float().mean() < 0.05
    assert not (found.certain & ~expected.certain).any()
    exact = head_of(weight, base * scale)[0].decide(hidden * scale, range(2), 0)
    assert bool(exact.certain.all())
    assert torch.equal(exact.mismatch, expected.mismatch)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_hidden_states_that_are_not_finite_end_the_measurement(value, dtype):
    weight, base = drawn(20, 8).to(dtype), drawn(2, 3, 8, seed=1).to(dtype)
    head, _ = head_of(weight, base)
    hidden = base.clone()
    hidden[1, 2, 3] = value
    with pytest.raises(MeasurementError, match="the model's logits are not finite"):
        head.decide(hidden, range(2), 0)


def test_large_finite_hidden_states_are_finite_though_their_sum_is_not():
    weight, base = torch.eye(3), torch.full((1, 2, 3), 1e38) + torch.tensor([2e38, 0, 1e37])
    head, _ = head_of(weight, base)
    assert not head.decide(base, [0], 0).mismatch.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [2, 15, 700])
def test_nll_is_that_of_the_full_logits(vocabulary, dtype):
    weight, base = drawn(vocabulary, 24).to(dtype), drawn(3, 5, 24, seed=1).to(dtype)
    head, reference = head_of(weight, base)
    hidden = base + drawn(3, 5, 24, seed=2).to(dtype)
    expected = negative_log_likelihood(logits_of(hidden, weight), reference)
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(head.nll(hidden), expected, rtol=tolerance, atol=tolerance)


def test_the_largest_move_is_that_of_the_leads():
    weight, base = drawn(60, 24), drawn(3, 5, 24, seed=1)
    head, reference = head_of(weight, base)
    hidden = base + 0.1 * drawn(3, 5, 24, seed=2)
    moved = (lead(logits_of(hidden, weight), reference) - lead(logits_of(base, weight), reference)).abs()
    assert head.largest_move(hidden) == pytest.approx(float(moved.max()), rel=1e-4)
    assert head.largest_move(base) == 0
