import itertools
import json
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dtm_fast as dtm
from dtm_fast.compression import name_of
from dtm_fast.measure import Measurement
from dtm_fast.measure.first_divergence import FirstDivergence
from dtm_fast.measure.racing import Contest, Dropped, fdt75, one_each, standing
from dtm_fast.measure.statistics import summarize

pytestmark = pytest.mark.once

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
    assert rest or probes < 8
    assert not rest or max(smallest[list(first)]) <= min(smallest[rest])
    fdt = torch.full((probes,), N)
    fdt[list(first)] = 3
    assert fdt75(fdt) == 3


def test_who_cannot_win_is_dropped_and_who_may_is_not():
    contest = Contest(2, margins(4))
    contest.take(named("b"), torch.tensor([10] * 4))
    assert not contest.cannot_win(named("x"), (0, 0))  # only one is known
    contest.take(named("d"), torch.tensor([8] * 4))
    assert not contest.cannot_win(named("x"), (9, 0))
    assert not contest.cannot_win(named("c"), (8, 0))  # as good as the second, and named before it
    assert contest.cannot_win(named("e"), (8, 8))
    assert contest.cannot_win(named("a"), (7.9, 8))


def test_where_means_decide_too_who_cannot_win_is_below_in_both():
    contest = Contest(2, margins(4), by="fdt75+mean")
    contest.take(named("b"), torch.tensor([10] * 4))
    contest.take(named("d"), torch.tensor([0, 4, 8, 8]))  # FDT_75 8, mean 5
    assert not contest.cannot_win(named("x"), (8.1, 0))
    assert not contest.cannot_win(named("x"), (8, 5.1))
    assert not contest.cannot_win(named("c"), (8, 5))  # as good as the second, and named before it
    assert contest.cannot_win(named("e"), (8, 5))
    assert contest.cannot_win(named("a"), (8, 4.9))
    assert contest.cannot_win(named("a"), (7.9, 20))


def test_a_judge_drops_with_what_is_known():
    contest = Contest(1, margins(4))
    contest.take(named("b"), torch.tensor([10] * 4))
    judge = contest.referee(named("x"))
    assert judge.goes_on(found_of([3, N, N, N], [3, 5, 5, 5]))
    assert judge.lost is None
    assert not judge.goes_on(found_of([3, 2, 4, 4], [3, 2, 4, 4]))
    assert judge.lost is not None
    assert (judge.lost.highest, judge.lost.highest_mean, judge.lost.proved) == (4.0, 3.25, True)
    assert judge.lost.seen.tolist() == [3, 2, 4, 4]


@pytest.mark.parametrize("error", [0.01, 0.1, 0.3])
def test_statistics_drop_one_of_the_best_no_more_often_than_said(error):
    """A candidate that just reaches the threshold, its good probes anywhere: how often is it dropped?"""
    probes, good = 100, 25  # the fewest with which FDT_75 reaches a threshold
    dropped = 0
    draw = torch.Generator().manual_seed(0)
    trials = 2000
    for _ in range(trials):
        fdt = torch.zeros(probes, dtype=torch.int64)
        fdt[torch.randperm(probes, generator=draw)[:good]] = N
        contest = Contest(1, margins(probes), error)
        contest.take(named("b"), torch.full((probes,), N - 1))
        upper, seen = torch.full((probes,), N), torch.zeros(probes, dtype=torch.int64)
        judge = contest.referee(named("x"))
        for group in contest.groups[:-1]:
            upper[group], seen[group] = fdt[group], 1
            if not judge.goes_on(FirstDivergence(N, upper, torch.zeros(probes), seen)):
                dropped += 1
                break
    assert dropped / trials <= error + 0.02  # two standard errors of 2,000 trials


@pytest.mark.parametrize("probes", range(2, 65))
def test_statistics_ask_for_as_many_good_probes_as_the_percentile_needs(probes):
    # Of those above a threshold of 1, which interpolation reaches from so far above it.
    needed = next(
        good for good in range(1, 65) if fdt75(torch.tensor([N] * good + [0] * (probes - good))) >= 1
    )
    # All but one probe are read, and so many are good that with the last one it is, or is not, enough.
    for good, error, goes_on in ((needed - 1, 1e-9, True), (needed - 2, 1 - 1e-9, False)):
        if good < 0:
            continue
        contest = Contest(1, margins(probes), error)
        contest.take(named("b"), torch.ones(probes, dtype=torch.int64))
        order = [probe for group in contest.groups for probe in group]
        fdt, seen = torch.full((probes,), N), torch.zeros(probes, dtype=torch.int64)
        seen[order[:-1]], fdt[order[good:-1]] = N, 0
        lost = contest.why_lost(named("a"), FirstDivergence(N, fdt, torch.zeros(probes), seen))
        assert (lost is None) == goes_on


def test_statistics_drop_a_bad_one_early():
    contest = Contest(1, margins(64), 0.05)
    contest.take(named("b"), torch.full((64,), N - 1))
    read = [probe for group in contest.groups[:2] for probe in group]
    fdt, seen = torch.full((64,), N), torch.zeros(64, dtype=torch.int64)
    fdt[read], seen[read] = 2, 2
    judge = contest.referee(named("x"))
    assert not judge.goes_on(FirstDivergence(N, fdt, torch.zeros(64), seen))
    assert judge.lost is not None
    assert not judge.lost.proved


def test_who_is_known_is_in_the_contest():
    best = Measurement.of_first(named("a"), N, torch.full((4,), 15), torch.zeros(4), 0.1)
    low = Dropped(named("b"), 12.0, torch.zeros(4, dtype=torch.int64), proved=True)
    guess = Dropped(named("c"), 12.0, torch.zeros(4, dtype=torch.int64), proved=False)
    contest = Contest(1, margins(4), known=[best, low, guess])
    lost = [contest.why_lost(named(name), FirstDivergence.unknown(4, N)) for name in "bcd"]
    assert lost[0].to_json() == low.to_json() | {"highest_mean": N}
    assert lost[1:] == [None, None]


def test_of_what_is_known_of_one_a_measurement_counts_before_bounds_and_proofs_before_guesses():
    def measured(fdt):
        return Measurement.of_first(named("a"), N, torch.full((4,), fdt), torch.zeros(4), 0.1)

    def dropped(highest, proved):
        return Dropped(named("a"), highest, torch.zeros(4, dtype=torch.int64), proved)

    first, second = measured(15), measured(15)
    loose, tight, guess = dropped(12.0, True), dropped(11.0, True), dropped(3.0, False)
    other = Dropped(named("b"), 9.0, torch.zeros(4, dtype=torch.int64), False)
    assert one_each([first, other, second]) == [first, other]
    assert one_each([tight, first, loose]) == [first]
    assert one_each([guess, loose, tight, guess]) == [tight]
    assert one_each([guess]) == [guess]


@pytest.mark.parametrize("kept_mean", [14.0, None])  # a row of an earlier version has none
def test_what_was_known_of_one_and_what_is_read_of_the_other_drop_together(kept_mean):
    known = Dropped(named("x"), 12.0, torch.zeros(4, dtype=torch.int64), True, kept_mean)
    contest = Contest(1, margins(4), known=[known], by="fdt75+mean")
    contest.take(named("b"), torch.tensor([9, 11, 12, 12]))  # FDT_75 12, mean 11
    judge = contest.referee(named("x"))
    assert judge.goes_on(FirstDivergence.unknown(4, N))
    assert not judge.goes_on(found_of([3, 10, 10, N], [3, 10, 10, 5]))  # at most 12.5 and 10.75
    assert judge.lost is not None
    assert (judge.lost.highest, judge.lost.highest_mean) == (12.0, 10.75)


def test_a_new_bound_is_no_looser_than_the_one_it_takes_the_place_of():
    known = Dropped(named("x"), 12.0, torch.zeros(4, dtype=torch.int64), True, 10.9)
    contest = Contest(1, margins(4), known=[known], by="fdt75+mean")
    contest.take(named("b"), torch.tensor([7, 12, 12, 12]))  # FDT_75 12, mean 10.75
    judge = contest.referee(named("x"))
    assert judge.goes_on(FirstDivergence.unknown(4, N))
    assert not judge.goes_on(found_of([11, 11, 11, 12], [11, 11, 11, 12]))  # at most 11.25 and 11.25
    assert judge.lost is not None
    assert (judge.lost.highest, judge.lost.highest_mean) == (11.25, 10.9)


def raced(contest: Contest, candidates: dict[str, list[int]], draw: random.Random) -> dict[str, Dropped]:
    """Reads as ``FirstPass`` does, in groups and parts, with doubts that are settled after all parts."""
    lost = {}
    order = sorted(enumerate(candidates), key=lambda item: contest.turn(item[0], named(item[1])))
    for _, name in order:
        fdt, count = candidates[name], len(candidates[name])
        upper, seen, uncertain = [N] * count, [0] * count, {}
        judge = contest.referee(named(name))
        goes_on = judge.goes_on(found_of(upper, seen))
        for group, stop in itertools.product(contest.groups, (N // 4, N // 2, N)):
            if not goes_on:
                break
            for probe in group:
                if upper[probe] < N:
                    continue
                seen[probe] = stop
                if fdt[probe] >= stop or fdt[probe] == N:
                    continue
                if draw.random() < 0.2:
                    uncertain[probe] = [fdt[probe]]  # its divergence is not believed yet
                else:
                    upper[probe] = fdt[probe]
            goes_on = judge.goes_on(found_of(upper, seen, uncertain))
        if goes_on:
            contest.take(named(name), torch.tensor(fdt))
        else:
            lost[name] = judge.lost
    return lost


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 6).flatmap(
        lambda probes: st.lists(
            st.lists(st.one_of(st.just(N), st.integers(0, N)), min_size=probes, max_size=probes),
            min_size=1,
            max_size=12,
        )
    ),
    st.integers(1, 5),
    st.sampled_from(["fdt75", "fdt75+mean"]),
    st.randoms(use_true_random=False),
)
def test_a_race_ends_with_the_first_of_all_that_are_sorted(table, k, by, draw):
    """Some are measured and some dropped before: with bounds of both, or of FDT_75 alone as rows once had."""
    candidates = {chr(ord("a") + index): fdt for index, fdt in enumerate(table)}
    known: list[Measurement | Dropped] = []
    for name, fdt in candidates.items():
        exact = standing(torch.tensor(fdt))
        kind = draw.choice(["new", "new", "measured", "dropped", "dropped before means were kept", "guessed"])
        if kind == "measured":
            known.append(Measurement.of_first(named(name), N, torch.tensor(fdt), torch.zeros(len(fdt)), 0.1))
        elif kind != "new":
            high, mean = (min(N, value + draw.choice([0, 0.25, 3])) for value in exact)
            high = 0.0 if kind == "guessed" else high  # what is not proved says nothing
            known.append(
                Dropped(
                    named(name),
                    high,
                    torch.zeros(len(fdt), dtype=torch.int64),
                    proved=kind != "guessed",
                    highest_mean=mean if kind == "dropped" else None,
                )
            )
    contest = Contest(k, margins(len(table[0])), known=known, by=by)
    measured = {
        name for each in known if isinstance(each, Measurement) for name, _ in name_of(each.configuration)
    }
    lost = raced(contest, {name: fdt for name, fdt in candidates.items() if name not in measured}, draw)

    def key(name):
        fdt = candidates[name]
        means = () if by == "fdt75" else (-sum(fdt) / len(fdt),)
        return (-float(np.percentile(fdt, 75)), *means, name)

    assert not set(lost) & set(sorted(candidates, key=key)[:k])
    finished = [name for name in candidates if name not in lost]
    assert sorted(finished, key=key)[:k] == sorted(candidates, key=key)[:k]
    for name, dropped in lost.items():
        high, mean = standing(torch.tensor(candidates[name]))
        assert dropped.proved
        assert dropped.highest >= high
        assert dropped.highest_mean >= mean


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, N), min_size=1, max_size=40))
def test_a_standing_is_that_of_summaries(values):
    summary = summarize(torch.tensor(values))
    assert standing(torch.tensor(values)) == (summary.p75, summary.mean)


def test_candidates_are_read_by_name_or_as_they_were_given():
    def order(by):
        contest = Contest(1, margins(4), by=by)
        return sorted(range(3), key=lambda index: contest.turn(index, named("cab"[index])))

    assert (order("fdt75"), order("fdt75+mean")) == ([1, 2, 0], [0, 1, 2])


def test_a_dropped_configuration_goes_through_json():
    dropped = Dropped(named("b") | {"c": dtm.Prune(0.25)}, 12.5, torch.tensor([3, 0]), True, 9.75)
    again = Dropped.from_json(json.loads(json.dumps(dropped.to_json())))
    assert again.to_json() == dropped.to_json()
    assert again.configuration == dropped.configuration


def test_a_dropped_row_of_an_earlier_version_has_no_mean():
    stored = {"configuration": {"b": "int8"}, "highest": 12.5, "seen": [3, 0], "proved": True}
    assert Dropped.from_json(stored).highest_mean is None
