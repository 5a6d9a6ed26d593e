import pytest
import torch

from dtm_fast import Int4
from dtm_fast.errors import TreatmentError


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def nearest(group: list[float]) -> list[float]:
    """The papers' formula, one group and one number at a time."""
    least, most = min(0.0, *group), max(0.0, *group)
    scale = (most - least) / 15
    if scale == 0:
        return [0.0] * len(group)
    zero_point = round(-least / scale)
    return [(min(15, max(0, round(w / scale) + zero_point)) - zero_point) * scale for w in group]


@pytest.mark.parametrize(
    ("group", "expected"),
    [
        ([0.0, 5.0, 10.4, 15.0], [0.0, 5.0, 10.0, 15.0]),  # scale 1, zero point 0
        ([-15.0, -1.4, -2.5, -3.5], [-15.0, -1.0, -2.0, -4.0]),  # zero point 15; half to even
        ([-5.0, 10.0, 0.2, 3.6], [-5.0, 10.0, 0.0, 4.0]),  # zero point 5
        # Zero point 7.5 → 8: the least is rounded away from 0, the greatest cut off.
        ([-7.5, 7.5, 0.0, 1.2], [-8.0, 7.0, 0.0, 1.0]),
        ([3.0, 3.0, 3.0, 3.0], [3.0, 3.0, 3.0, 3.0]),  # the grid reaches from 0 to 3
        ([-3.0, -3.0, -3.0, -3.0], [-3.0, -3.0, -3.0, -3.0]),
        ([0.0, 0.0, -0.0, 0.0], [0.0, 0.0, 0.0, 0.0]),
        ([30.0, 31.0, 29.0, 28.9], [31.0, 31.0, 31 * 14 / 15, 31 * 14 / 15]),  # 0 is inside the grid
        ([1e-45, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]),  # too small for a scale
    ],
)
def test_a_group_by_hand(group, expected):
    found = Int4(4).compress(torch.tensor([group, [1.0, 2.0, 3.0, 4.0]]))
    torch.testing.assert_close(found[0], torch.tensor(expected), rtol=1e-6, atol=0)


@pytest.mark.parametrize("group", [1, 4, 12, 24, None])
def test_every_group_is_rounded_by_the_papers_formula(group):
    weight = random(7, 24) * torch.logspace(-3, 3, 7)[:, None]
    found = Int4(group).compress(weight)
    for row, rounded in zip(weight.double(), found, strict=True):
        expected = [w for part in row.split(group or 24) for w in nearest(part.tolist())]
        torch.testing.assert_close(rounded, torch.tensor(expected), rtol=1e-6, atol=0)


def test_a_group_has_at_most_16_values_and_zero_stays_zero():
    weight = random(3, 512)
    weight[:, ::7] = 0
    found = Int4(256).compress(weight)
    assert not found[:, ::7].any()
    for part in found.view(6, 256):
        assert 8 < len(part.unique()) <= 16


def test_a_smaller_group_errs_less():
    weight = random(20, 256)
    errors = [float((Int4(group).compress(weight) - weight).norm()) for group in (16, 64, None)]
    assert errors == sorted(errors)


def test_a_group_that_does_not_fit_the_row_is_refused():
    with pytest.raises(TreatmentError, match=r"int4\(128\) needs a K that is a multiple of 128, and K = 576"):
        Int4().compress(random(2, 576))
