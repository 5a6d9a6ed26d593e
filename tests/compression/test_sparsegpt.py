import pytest
import torch
from textbook_obs import correlated, damped, layer_error, remaining_inverse, swept
from torch import Tensor

from dtm_fast import Prune, SparseGPT
from dtm_fast.errors import TreatmentError
from dtm_fast.model import InputStatistics


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def textbook(weight: Tensor, gram: Tensor, sparsity: float | str, damp: float, block: int) -> Tensor:
    """Where a block begins, the weights go whose removal alone costs least with what is left to make up for it."""
    n, k = weight.shape
    dead = gram.diagonal() == 0
    hessian = damped(gram, damp)
    gone: set[tuple[int, int]] = set()

    def choose(first: int, current: Tensor) -> None:
        columns = range(first, min(first + block, k))
        cost = {
            (row, column): float(current[row, column] ** 2 / remaining_inverse(hessian, column)[0, 0])
            for row in range(n)
            for column in columns
        }
        if isinstance(sparsity, str):
            kept = int(sparsity.split(":")[0])
            for row in range(n):
                gone.update(sorted(((row, c) for c in columns), key=cost.__getitem__)[: block - kept])
        else:
            count = round(sparsity * n * (columns[-1] + 1)) - round(sparsity * n * first)
            gone.update(sorted(cost, key=cost.__getitem__)[:count])

    def settled(column: int, current: Tensor) -> Tensor:
        if column % block == 0:
            choose(column, current)
        stays = torch.tensor([(row, column) not in gone for row in range(n)])
        return current[:, column] * stays

    return swept(weight.masked_fill(dead, 0), hessian, settled)


def statistics_of(gram: list[list[float]]) -> InputStatistics:
    return InputStatistics("by hand", 3, len(gram), {"gram": torch.tensor(gram)}.__getitem__)


@pytest.mark.parametrize(
    ("weight", "expected"),
    [
        # With H = [[2, 1], [1, 2]] removing the first costs w² / (2/3), for the second can make up for half of it;
        # removing the second costs 2 w².
        ([3.0, 2.0], [3.0, 0.0]),  # 13.5 > 8
        ([2.0, 3.0], [0.0, 4.0]),  # 6 < 18
        ([2.2, 2.0], [0.0, 3.1]),  # 7.26 < 8, although 2.2 is the larger
    ],
)
@pytest.mark.parametrize("sparsity", [0.5, "1:2"])
def test_by_hand(weight, expected, sparsity):
    inputs = statistics_of([[2.0, 1.0], [1.0, 2.0]])
    found = SparseGPT(sparsity, damp=0).compress(torch.tensor([weight]), inputs)
    torch.testing.assert_close(found, torch.tensor([expected]))


@pytest.mark.parametrize(
    ("sparsity", "block"), [(0.5, 128), (0.3, 48), (0.77, 150), (0.5, 1), ("2:4", 4), ("4:8", 8), ("1:2", 2)]
)
@pytest.mark.parametrize("damp", [0.01, 0.3])
def test_it_is_the_textbook_recursion(sparsity, block, damp):
    inputs, weight = InputStatistics.of(correlated(400, 144)), random(4, 144)
    treatment = SparseGPT(sparsity, damp) if isinstance(sparsity, str) else SparseGPT(sparsity, damp, block)
    found = treatment.compress(weight, inputs)
    expected = textbook(weight, inputs.gram, sparsity, damp, block).float()
    assert torch.equal(found == 0, expected == 0)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_it_is_the_textbook_recursion_where_channels_are_never_used():
    x = correlated(300, 64)
    x[:, [3, 40]] = 0
    inputs, weight = InputStatistics.of(x), random(4, 64)
    found = SparseGPT(0.4, block=32).compress(weight, inputs)
    expected = textbook(weight, inputs.gram, 0.4, 0.01, 32).float()
    assert torch.equal(found == 0, expected == 0)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    assert not found[:, [3, 40]].any()


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("block", [128, 50])
def test_so_many_go_as_of_prune(sparsity, block):
    weight = random(7, 150)
    found = SparseGPT(sparsity, block=block).compress(weight, InputStatistics.of(correlated(300, 150)))
    assert int((found == 0).sum()) == int((Prune(sparsity).compress(weight) == 0).sum())
    if sparsity == 0:
        torch.testing.assert_close(found, weight, rtol=1e-6, atol=0)


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:2", "3:16"])
def test_of_every_m_exactly_n_are_kept(pattern):
    n, m = map(int, pattern.split(":"))
    found = SparseGPT(pattern).compress(random(7, 144), InputStatistics.of(correlated(300, 144)))
    assert set((found != 0).view(7, -1, m).sum(-1).flatten().tolist()) == {n}


@pytest.mark.parametrize("sparsity", [0.5, "2:4"])
def test_it_errs_less_than_what_only_drops(sparsity):
    x, weight = correlated(600, 128, seed=3), random(24, 128)
    inputs = InputStatistics.of(x)
    error = {
        t.key: layer_error(t.compress(weight, inputs) - weight, x)
        for t in (SparseGPT(sparsity), Prune(sparsity), Prune(sparsity, "wanda"))
    }
    ours, magnitude, wanda = error.values()
    assert ours < wanda < magnitude


def test_a_pattern_that_does_not_fit_the_row_is_refused():
    with pytest.raises(TreatmentError, match="the pattern 4:8 needs rows of a multiple of 8, and K = 12"):
        SparseGPT("4:8").compress(random(4, 12), InputStatistics.of(random(20, 12)))
