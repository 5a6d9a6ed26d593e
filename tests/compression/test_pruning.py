import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dtm_fast import Drop, Prune
from dtm_fast.errors import TreatmentError
from dtm_fast.model import InputStatistics

SHARES = st.floats(0, 1)
SEEDS = st.integers(0, 99)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def with_ties(n: int, k: int, seed: int) -> torch.Tensor:
    """Whole numbers from -3 to 3 without 0, so that what is 0 was dropped."""
    drawn = torch.randint(1, 4, (n, k), generator=torch.Generator().manual_seed(seed))
    return (drawn * torch.where(random(n, k, seed=seed) > 0, 1, -1)).float()


def dropped_in_order(saliency: list[float], count: int) -> set[int]:
    """The places of the least salient, of equals the first, by sorting."""
    return set(sorted(range(len(saliency)), key=lambda place: (saliency[place], place))[:count])


# X with ‖X_j‖₂ = 8, 1, 1, 1.
INPUTS = InputStatistics.of(torch.tensor([[4.8, 0.6, 0.0, 1.0], [6.4, 0.8, 1.0, 0.0]]))
WEIGHT = torch.tensor([[1.0, -2.0, 3.0, -4.0], [4.0, 3.0, 2.0, 1.0]])


def test_by_magnitude_by_hand():
    weight = torch.tensor([[1.0, -4.0, 0.5], [-2.0, 3.0, 0.25]])
    assert torch.equal(Prune(0.5).compress(weight), torch.tensor([[0.0, -4.0, 0.0], [-2.0, 3.0, 0.0]]))


def test_in_each_row_by_hand():
    weight = torch.tensor([[1.0, -4.0, 5.0, 6.0], [0.1, -0.4, 0.2, 0.3]])
    expected = torch.tensor([[0.0, 0.0, 5.0, 6.0], [0.0, -0.4, 0.0, 0.3]])
    assert torch.equal(Prune(0.5, group="row").compress(weight), expected)
    # Of the whole matrix all of the second row goes.
    assert Prune(0.5).compress(weight)[1].tolist() == [0, 0, 0, 0]


def test_by_wanda_by_hand():
    # |W| ‖X‖ = [8, 2, 3, 4] and [32, 3, 2, 1]: two of each row go.
    expected = torch.tensor([[1.0, 0.0, 0.0, -4.0], [4.0, 3.0, 0.0, 0.0]])
    assert torch.equal(Prune(0.5, "wanda").compress(WEIGHT, INPUTS), expected)
    # Of five of the whole matrix 1, 2, 2, 3 and 3 go.
    expected = torch.tensor([[1.0, 0.0, 0.0, -4.0], [4.0, 0.0, 0.0, 0.0]])
    assert torch.equal(Prune(5 / 8, "wanda", "matrix").compress(WEIGHT, INPUTS), expected)
    assert Prune(0.5).compress(WEIGHT).tolist() == [[0, 0, 3, -4], [4, 3, 0, 0]]


def test_by_wanda_in_a_pattern_by_hand():
    # |W| ‖X‖ of pairs: 8 > 2, 3 < 4 and 32 > 3, 2 > 1.
    expected = torch.tensor([[1.0, 0.0, 0.0, -4.0], [4.0, 0.0, 2.0, 0.0]])
    assert torch.equal(Prune("1:2", "wanda").compress(WEIGHT, INPUTS), expected)


def test_patterns_by_hand():
    weight = torch.tensor([[1.0, -2.0, 3.0, -4.0, 1.0, 1.0, 1.0, 1.0]])
    kept = {
        "2:4": [0, 0, 3, -4, 0, 0, 1, 1],
        "1:4": [0, 0, 0, -4, 0, 0, 0, 1],
        "3:4": [0, -2, 3, -4, 0, 1, 1, 1],
        "1:2": [0, -2, 0, -4, 0, 1, 0, 1],
        "4:8": [0, -2, 3, -4, 0, 0, 0, 1],
    }
    for pattern, expected in kept.items():
        assert Prune(pattern).compress(weight).tolist() == [expected], pattern


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:2", "3:16"])
@pytest.mark.parametrize("saliency", ["magnitude", "wanda"])
def test_of_every_m_exactly_n_are_kept(pattern, saliency):
    n, m = map(int, pattern.split(":"))
    found = Prune(pattern, saliency).compress(with_ties(7, 48, 0), InputStatistics.of(random(20, 48)))
    assert set((found != 0).view(7, -1, m).sum(-1).flatten().tolist()) == {n}


@settings(max_examples=100, deadline=None)
@given(SHARES, SEEDS, st.sampled_from(["matrix", "row"]))
def test_the_least_salient_go_and_of_equals_the_first(share, seed, group):
    weight = with_ties(5, 8, seed)
    found = Prune(share, group=group).compress(weight)
    for row, pruned in [(weight, found)] if group == "matrix" else zip(weight, found, strict=True):
        count = round(share * row.numel())
        gone = dropped_in_order(row.abs().flatten().tolist(), count)
        kept = [0.0 if place in gone else value for place, value in enumerate(row.flatten().tolist())]
        assert pruned.flatten().tolist() == kept


@settings(max_examples=100, deadline=None)
@given(
    SHARES, SHARES, SEEDS, st.sampled_from([("magnitude", "matrix"), ("magnitude", "row"), ("wanda", "row")])
)
def test_masks_of_rising_sparsity_are_nested(one, other, seed, ranking):
    weight, inputs = with_ties(5, 8, seed), InputStatistics.of(random(3, 8).round())
    low, high = (Prune(share, *ranking).compress(weight, inputs) != 0 for share in sorted((one, other)))
    assert not bool((high & ~low).any())


def test_at_its_ends():
    weight = random(5, 7)
    for group in ("matrix", "row"):
        assert torch.equal(Prune(0, group=group).compress(weight), weight)
        assert not Prune(1, group=group).compress(weight).any()


def test_a_channel_that_is_never_used_goes_first_by_wanda():
    x = random(10, 6)
    x[:, 4] = 0
    found = Prune(1 / 6, "wanda").compress(random(3, 6), InputStatistics.of(x))
    assert (found == 0).nonzero()[:, 1].tolist() == [4, 4, 4]


def test_the_usual_groups():
    assert [Prune(0.5).group, Prune(0.5, "wanda").group, Prune("2:4").group] == ["matrix", "row", None]
    assert Prune(0.5) == Prune(0.5, "magnitude", "matrix")
    assert Prune(0.5, "wanda") == Prune(0.5, "wanda", "row")


def test_a_pattern_that_does_not_fit_the_row_is_refused():
    with pytest.raises(TreatmentError, match="the pattern 2:4 needs rows of a multiple of 4, and K = 6"):
        Prune("2:4").compress(random(4, 6))
    with pytest.raises(TreatmentError, match="the pattern 4:8 needs rows of a multiple of 8, and K = 4"):
        Prune("4:8").compress(random(4, 4))


def test_drop_leaves_nothing():
    weight = random(4, 6).bfloat16()
    assert torch.equal(Drop().compress(weight), torch.zeros(4, 6, dtype=torch.bfloat16))
