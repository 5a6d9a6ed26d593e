"""The multiple-choice knapsack against all combinations."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtm_fast.errors import InputError
from dtm_fast.plan.knapsack import Option, _given_back, choose

options = st.builds(Option, st.integers(0, 40), st.integers(-5, 60).map(float))
units = st.lists(st.lists(options, min_size=1, max_size=4), min_size=1, max_size=5)


def total(rows, picked):
    return (
        sum(row[i].bits for row, i in zip(rows, picked, strict=True)),
        sum(row[i].harm for row, i in zip(rows, picked, strict=True)),
    )


def optimum(rows, budget):
    every = (total(rows, picked) for picked in itertools.product(*(range(len(row)) for row in rows)))
    return min((harm for bits, harm in every if bits <= budget), default=None)


@given(units, st.integers(0, 200))
def test_it_fits_and_is_within_one_steps_harm_of_the_optimum(rows, budget):
    best = optimum(rows, budget)
    if best is None:
        with pytest.raises(InputError, match=r"the smallest that can be reached is \d+"):
            choose(rows, budget)
        return
    bits, harm = total(rows, choose(rows, budget))
    assert bits <= budget
    worst = max(max(o.harm for o in row) - min(o.harm for o in row) for row in rows)
    assert best <= harm <= best + worst


@given(
    st.lists(st.lists(st.integers(0, 20), min_size=1, max_size=3), min_size=1, max_size=5), st.integers(0, 15)
)
def test_where_all_steps_save_alike_it_is_the_optimum(rises, budget):
    """Harms that rise convexly, one bit saved by each step: then no budget falls into the middle of a step."""
    rows = []
    for row in rises:
        harms = itertools.accumulate(sorted(row), initial=0)
        rows.append([Option(len(row) - place, float(harm)) for place, harm in enumerate(harms)])
    assert total(rows, choose(rows, budget))[1] == optimum(rows, budget)


def test_the_step_that_harms_least_for_a_bit_comes_first():
    rows = [[Option(16, 0.0), Option(8, 1.0)], [Option(160, 0.0), Option(80, 2.0)]]
    assert choose(rows, 176) == [0, 0]
    assert choose(rows, 168) == [0, 1], (
        "2 for 80 bits are less for each than 1 for 8: here one step above the optimum"
    )
    assert choose(rows, 96) == [0, 1]
    assert choose(rows, 88) == [1, 1]


def test_a_point_above_the_hull_is_taken_only_to_use_what_is_left():
    row = [Option(16, 0.0), Option(12, 9.0), Option(8, 10.0)]
    assert choose([row], 11) == [2]
    assert choose([row], 12) == [1], "the hull goes from 16 to 8; what is left allows 12"


def test_what_looks_harmless_is_made_small_only_where_the_budget_asks():
    row = [Option(16, 0.0), Option(8, 0.0), Option(4, 0.0)]
    assert choose([row, row], 32) == [0, 0]
    assert total([row, row], choose([row, row], 24)) == (24, 0.0)
    assert choose([row, row], 8) == [2, 2]


def test_harms_below_zero_are_gains():
    assert choose([[Option(16, 0.0), Option(8, -1.0)]], 100) == [1]


def test_what_is_left_goes_to_the_option_that_helps_most():
    rows = [[Option(0, 10.0), Option(5, 9.0)], [Option(0, 10.0), Option(5, 4.0), Option(9, 0.0)]]
    assert _given_back(rows, [0, 0], 5) == [0, 1]
    assert _given_back(rows[::-1], [0, 0], 5) == [1, 0]
    assert _given_back(rows, [0, 0], 10) == [0, 2]  # what is left then is too little for another
    assert _given_back(rows, [0, 0], 14) == [1, 2]
