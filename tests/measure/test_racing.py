import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dtm_fast as dtm
from dtm_fast.measure import Measurement
from dtm_fast.measure.first_divergence import FirstDivergence
from dtm_fast.measure.racing import Contest, Dropped, fdt75, name_of

N = 20


def found_of(fdt: list[int], seen: list[int], uncertain: dict[int, list[int]] | None = None):
    return FirstDivergence(
        N, torch.tensor(fdt), torch.zeros(len(fdt)), torch.tensor(seen), uncertain if uncertain else {}
    )


def named(name: str) -> dict:
    return {name: dtm.Int8()}


def margins(probes: int) -> torch.Tensor:
    return torch.rand(probes, N, generator=torch.Generator().manual_seed(1))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, N), min_size=1, max_size=40))
def test_fdt75_is_the_percentile_of_summaries(values):
    assert fdt75(torch.tensor(values)) == float(np.percentile(values, 75))


def test_a_name_does_not_depend_on_the_order_of_writing():
    one, two = {"a": dtm.Int8(), "b": dtm.Prune(0.5)}, {"b": dtm.Prune(0.5), "a": dtm.Int8()}
    assert name_of(one) == name_of(two) == (("a", "int8"), ("b", "prune(0.5)"))


def test_bounds_are_what_was_read():
    lowest, highest = found_of([3, N, N, N], [3, 10, 0, 10], {3: [4, 6]}).bounds()
    assert lowest.tolist() == [3, 10, 0, 4]
    assert highest.tolist() == [3, N, N, N]


@pytest.mark.parametrize("probes", [1, 2, 3, 4, 5, 8, 9, 16, 17, 64])
@pytest.mark.parametrize("error", [0.0, 0.05])
def test_the_groups_hold_every_probe_once(probes, error):
    groups = Contest(3, margins(probes), error).groups
    assert sorted(itertools.chain(*groups)) == list(range(probes))
    assert all(groups)


@pytest.mark.parametrize("probes", [5, 8, 16, 33])
def test_the_first_group_is_of_the_smallest_margins_and_can_settle_the_percentile(probes):
    given_margins = margins(probes)
    first = Contest(3, given_margins).groups[0]
    smallest = given_margins.amin(1)
    rest = [probe for probe in range(probes) if probe not in first]
    assert not rest or max(smallest[list(first)]) <= min(smallest[rest])
    fdt = torch.full((probes,), N)
    fdt[list(first)] = 3
    assert fdt75(fdt) == 3


def test_who_cannot_win_is_dropped_and_who_may_is_not():
    contest = Contest(2, margins(4))
    contest.take(named("b"), torch.tensor([10] * 4))
    assert not contest.cannot_win(named("x"), 0)  # only one is known
    contest.take(named("d"), torch.tensor([8] * 4))
    assert not contest.cannot_win(named("x"), 9)
    assert not contest.cannot_win(named("c"), 8)  # as good as the second, and named before it
    assert contest.cannot_win(named("e"), 8)
    assert contest.cannot_win(named("a"), 7.9)


def test_a_judge_drops_with_what_is_known():
    contest = Contest(1, margins(4))
    contest.take(named("b"), torch.tensor([10] * 4))
    judge = contest.referee(named("x"))
    assert judge.goes_on(found_of([3, N, N, N], [3, 5, 5, 5]))
    assert judge.lost is None
    assert not judge.goes_on(found_of([3, 2, 4, 4], [3, 2, 4, 4]))
    assert judge.lost is not None
    assert (judge.lost.highest, judge.lost.proved) == (4.0, True)
    assert judge.lost.seen.tolist() == [3, 2, 4, 4]


@pytest.mark.parametrize("error", [0.01, 0.1, 0.3])
def test_statistics_drop_one_of_the_best_no_more_often_than_said(error):
    """A candidate that just reaches the threshold, its good probes anywhere: how often is it dropped?"""
    probes, good = 16, 4  # the fewest with which FDT_75 reaches a threshold
    dropped = 0
    draw = torch.Generator().manual_seed(0)
    trials = 2000
    for _ in range(trials):
        fdt = torch.zeros(probes, dtype=torch.int64)
        fdt[torch.randperm(probes, generator=draw)[:good]] = N
        contest = Contest(1, margins(probes), error)
        contest.take(named("b"), torch.full((probes,), N - 1))
        order = list(contest.groups[0])
        seen = torch.zeros(probes, dtype=torch.int64)
        seen[order] = 1
        upper = torch.full((probes,), N)
        upper[order] = fdt[order]
        judge = contest.referee(named("x"))
        dropped += not judge.goes_on(FirstDivergence(N, upper, torch.zeros(probes), seen))
    assert dropped / trials <= error + 0.02  # two standard errors of 2,000 trials


def test_statistics_drop_a_bad_one_early():
    contest = Contest(1, margins(16), 0.05)
    contest.take(named("b"), torch.full((16,), N - 1))
    read = [probe for group in contest.groups[:2] for probe in group]
    fdt, seen = torch.full((16,), N), torch.zeros(16, dtype=torch.int64)
    fdt[read], seen[read] = 2, 2
    judge = contest.referee(named("x"))
    assert not judge.goes_on(FirstDivergence(N, fdt, torch.zeros(16), seen))
    assert judge.lost is not None
    assert not judge.lost.proved


def test_who_is_known_is_in_the_contest():
    best = Measurement.of_first(named("a"), N, torch.full((4,), 15), torch.zeros(4), 0.1)
    low = Dropped(named("b"), 12.0, torch.zeros(4, dtype=torch.int64), proved=True)
    guess = Dropped(named("c"), 12.0, torch.zeros(4, dtype=torch.int64), proved=False)
    contest = Contest(1, margins(4), known=[best, low, guess])
    assert [contest.highest(named(name)) for name in "abcd"] == [N, 12, N, N]
    assert [contest.cannot_win(named(name), contest.highest(named(name))) for name in "bcd"] == [
        True,
        False,
        False,
    ]


def test_a_dropped_configuration_goes_through_json():
    dropped = Dropped(named("b") | {"c": dtm.Prune(0.25)}, 12.5, torch.tensor([3, 0]), proved=True)
    again = Dropped.from_json(json.loads(json.dumps(dropped.to_json())))
    assert again.to_json() == dropped.to_json()
    assert again.configuration == dropped.configuration
