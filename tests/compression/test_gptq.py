import pytest
import torch
from textbook_obs import correlated, damped, layer_error, swept
from torch import Tensor

from dtm_fast import GPTQ, Int4
from dtm_fast.errors import TreatmentError
from dtm_fast.model import InputStatistics


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def statistics_of(gram: list[list[float]]) -> InputStatistics:
    return InputStatistics("by hand", 3, len(gram), {"gram": torch.tensor(gram)}.__getitem__)


def textbook(weight: Tensor, gram: Tensor, damp: float, group: int) -> Tensor:
    """Rounded to nearest on each group's grid, as the group's weights are when its first column's turn comes."""
    dead = gram.diagonal() == 0
    weight = weight.masked_fill(dead, 0)
    grids: list[tuple[float, int]] = []

    def settled(column: int, current: Tensor) -> Tensor:
        if column % group == 0:
            grids[:] = []
            for row in current[:, column : column + group].tolist():
                least, most = min(0.0, *row), max(0.0, *row)
                scale = (most - least) / 15
                grids.append((scale, round(-least / scale)))
        values = []
        for w, (scale, zero_point) in zip(current[:, column].tolist(), grids, strict=True):
            values.append((min(15, max(0, round(w / scale) + zero_point)) - zero_point) * scale)
        return torch.tensor(values, dtype=torch.float64)

    return swept(weight, damped(gram, damp), settled)


def test_by_hand():
    # The grid is that of the whole row: scale 1, zero point 0. 7.4 becomes 7, 0.4 less. In H = [[2, 1], [1, 2]] that
    # is made up for by half of it: 3.4 + 0.2 → 4, where rounding to nearest gives 3. Column 2 knows nothing of both.
    inputs = statistics_of([[2.0, 1.0, 0.0], [1.0, 2.0, 0.0], [0.0, 0.0, 1.0]])
    weight = torch.tensor([[7.4, 3.4, 15.0]])
    assert GPTQ(None, damp=0).compress(weight, inputs).tolist() == [[7.0, 4.0, 15.0]]
    assert Int4(None).compress(weight).tolist() == [[7.0, 3.0, 15.0]]


def test_damp_by_hand():
    # λ = 1 · mean(2, 2, 1) = 5/3: made up for by 1 / (2 + 5/3) = 3/11 of the error, 3.4 + 0.109 → 4 nearly not.
    inputs = statistics_of([[2.0, 1.0, 0.0], [1.0, 2.0, 0.0], [0.0, 0.0, 1.0]])
    for second, expected in ((3.40, 4.0), (3.38, 3.0)):
        weight = torch.tensor([[7.4, second, 15.0]])
        assert GPTQ(None, damp=1).compress(weight, inputs).tolist() == [[7.0, expected, 15.0]]


def test_a_groups_grid_is_that_of_its_weights_when_it_begins():
    # 7.4 → 7 adds 0.2 to the second group's first weight, 14.8: its grid is then 1 apart, and 6.6 → 7 on it.
    gram = torch.eye(4)
    gram[0, 2] = gram[2, 0] = 0.5
    inputs = statistics_of(gram.tolist())
    weight = torch.tensor([[7.4, 15.0, 14.8, 6.6]])
    found = GPTQ(2, damp=0).compress(weight, inputs)
    torch.testing.assert_close(found, torch.tensor([[7.0, 15.0, 15.0, 7.0]]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("group", [16, 32, 40, 80, 160, None])
@pytest.mark.parametrize("damp", [0.01, 0.3])
def test_it_is_the_textbook_recursion(group, damp):
    inputs, weight = InputStatistics.of(correlated(400, 160)), random(5, 160)
    found = GPTQ(group, damp).compress(weight, inputs)
    expected = textbook(weight, inputs.gram, damp, group or 160)
    torch.testing.assert_close(found, expected.float(), rtol=1e-6, atol=1e-12)


def test_it_is_the_textbook_recursion_where_channels_are_never_used():
    x = correlated(400, 96)
    x[:, [0, 17, 40, 95]] = 0
    inputs, weight = InputStatistics.of(x), random(5, 96)
    found = GPTQ(32).compress(weight, inputs)
    expected = textbook(weight, inputs.gram, 0.01, 32)
    torch.testing.assert_close(found, expected.float(), rtol=1e-6, atol=1e-12)
    assert not found[:, [0, 17, 40, 95]].any()


def test_it_does_not_depend_on_the_scale_of_the_inputs():
    x, weight = correlated(200, 64), random(5, 64)
    x[:, 9] = 0
    found = [GPTQ(32).compress(weight, InputStatistics.of(x * factor)) for factor in (1.0, 2.0**-20, 2.0**20)]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("group", [32, None])
def test_it_errs_less_than_rounding_to_nearest(group):
    x, weight = correlated(600, 128, seed=3), random(24, 128)
    gptq, int4 = (t.compress(weight, InputStatistics.of(x)) - weight for t in (GPTQ(group), Int4(group)))
    assert layer_error(gptq, x) < layer_error(int4, x)
    assert float(gptq.norm()) > float(int4.norm())  # the weights themselves are further away


def test_where_channels_know_nothing_of_each_other_it_is_rounding_to_nearest():
    inputs, weight = InputStatistics.of(torch.eye(64) * torch.linspace(1, 2, 64)), random(5, 64)
    torch.testing.assert_close(
        GPTQ(16).compress(weight, inputs), Int4(16).compress(weight), rtol=1e-6, atol=0
    )


def test_every_weight_lies_on_its_groups_grid():
    found = GPTQ(32).compress(random(3, 96), InputStatistics.of(correlated(200, 96)))
    assert all(len(part.unique()) <= 16 for part in found.view(-1, 32))


def test_fewer_tokens_than_channels_are_enough_with_damp():
    inputs, weight = InputStatistics.of(correlated(20, 96)), random(3, 96)
    torch.testing.assert_close(
        GPTQ(32).compress(weight, inputs),
        textbook(weight, inputs.gram, 0.01, 32).float(),
        rtol=1e-6,
        atol=1e-12,
    )


def test_inputs_that_cannot_be_inverted_are_said_and_damp_is_not_raised():
    inputs, weight = statistics_of([[1.0, 2.0], [2.0, 1.0]]), random(3, 2)
    with pytest.raises(TreatmentError) as error:
        GPTQ(None, damp=0.5).compress(weight, inputs)
    assert str(error.value) == (
        "XᵀX of its inputs over 3 tokens is not positive definite with damp = 0.5; a larger damp or more tokens make "
        "it so"
    )
    assert GPTQ(None, damp=2).compress(weight, inputs).any()


def test_a_group_that_does_not_fit_the_row_is_refused():
    with pytest.raises(TreatmentError, match=r"gptq\(128\) needs a K that is a multiple of 128, and K = 576"):
        GPTQ().compress(random(2, 576), InputStatistics.of(random(3, 576)))
