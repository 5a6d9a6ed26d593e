import itertools

import torch

from benchmarks import int8_linear_cases, masked_linear_cases, sparse_linear_cases, token_divergence_cases
from benchmarks.case import OURS, Contest, checked
from benchmarks.correctness import bit_equal, relative_error, share_of_positions
from benchmarks.interleave import Contender


def test_a_wrong_contender_is_caught_and_not_timed() -> None:
    truth = torch.randn(8, 8)
    off_by_one_value = truth.clone()
    off_by_one_value[3, 3] += 1
    good, unavailable, wrong = checked(
        Contest(
            [
                Contender("right", (lambda: truth.clone(),), bit_equal),
                Contender("one value", (lambda: off_by_one_value,), bit_equal),
                Contender("far", (lambda: truth * 1.1,), relative_error(0.05)),
                Contender("nan", (lambda: truth * torch.nan,), relative_error(0.05)),
                Contender("raises", (lambda: truth @ truth[:3],), bit_equal),
                Contender("missing", unavailable="not installed"),
            ],
            truth,
        )
    )
    assert [each.name for each in good] == ["right"]
    assert set(wrong) == {"one value", "far", "nan"}
    assert wrong["one value"] == "wrong result: 1 of 64 values differ from the twin's bits"
    assert unavailable["missing"] == "not installed"
    assert unavailable["raises"].startswith("RuntimeError: ")


def test_one_bad_row_cannot_hide_among_good_ones() -> None:
    truth = torch.randn(10_000, 4)
    result = truth.clone()
    result[77] = 0
    assert relative_error(0.05)(result, truth) is not None


def test_shapes_and_dtypes_must_agree() -> None:
    truth = torch.zeros(2, 3)
    assert bit_equal(torch.zeros(3, 2), truth) is not None
    assert bit_equal(torch.zeros(2, 3, dtype=torch.float64), truth) is not None
    assert share_of_positions(0.5)(torch.zeros(2, 3), truth) is not None


def test_positions() -> None:
    truth = torch.zeros(1, 100, dtype=torch.bool)
    result = truth.clone()
    result[0, 0] = True
    assert share_of_positions(0.01)(result, truth) is None
    assert share_of_positions(0.005)(result, truth) == "1.00% of positions differ, allowed 0.50%"


def test_a_wrong_kernel_of_ours_fails_each_check() -> None:
    cases = [
        int8_linear_cases.cases(compiled=False)[0],
        masked_linear_cases.cases()[0],
        masked_linear_cases.cases()[-1],
        sparse_linear_cases.cases()[0],
        token_divergence_cases.cases(large=False)[0],
    ]
    for case in cases:
        small = case.shrunk()
        contest = small.build(small)
        ours = contest.contenders[0]
        assert ours.name == OURS
        result = ours.calls[0]()
        assert ours.complaint(result, contest.expected) is None
        spoiled = (
            result._replace(mismatch=~result.mismatch)
            if isinstance(result, tuple)
            else result.roll(1, dims=-1)
        )
        assert ours.complaint(spoiled, contest.expected) is not None


def test_nested_masks_are_nested() -> None:
    case = masked_linear_cases.cases()[-1].shrunk()
    weight = torch.randn(case.N, case.K)
    masks = masked_linear_cases._masks(case, weight, torch.Generator())
    assert masks.shape == (8, case.N, case.K)
    for denser, sparser in itertools.pairwise(masks):
        assert bool((denser | ~sparser).all())
        assert int(denser.sum()) > int(sparser.sum())
