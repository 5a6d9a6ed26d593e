"""Max-min allocation against brute force, against linear programming's certificate, and on cases worked by hand."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dtm_fast.errors import InputError
from dtm_fast.plan.allocation import Allocation, Curve, allocate

# ---------------------------------------------------------------------------------------------- curves


def test_what_rises_gets_the_value_of_what_is_before():
    curve = Curve(((0.5, 7.0), (0.0, 9.0), (0.2, 3.0), (1.0, 1.0)))
    assert curve.points == ((0.0, 9.0), (0.2, 3.0), (0.5, 3.0), (1.0, 1.0))


def test_between_points_a_curve_is_straight():
    curve = Curve(((0.0, 10.0), (0.2, 6.0), (0.6, 6.0), (1.0, 0.0)))
    assert [curve.value_at(s) for s in (0.0, 0.05, 0.2, 0.3, 0.6, 1.0)] == [10, 9, 6, 6, 6, 0]
    assert curve.value_at(0.8) == pytest.approx(3, abs=1e-14)


@pytest.mark.parametrize(
    ("level", "smallest", "largest"),
    [(11, 0, 0), (10, 0, 0), (8, 0.1, 0.1), (6, 0.2, 0.6), (3, 0.8, 0.8), (0, 1, 1), (-1, 1, 1)],
)
def test_where_a_curve_is_at_a_level(level, smallest, largest):
    curve = Curve(((0.0, 10.0), (0.2, 6.0), (0.6, 6.0), (1.0, 0.0)))
    assert curve.smallest_at(level) == pytest.approx(smallest, abs=1e-15)
    assert curve.largest_at(level) == pytest.approx(largest, abs=1e-15)


@pytest.mark.parametrize(
    ("points", "said"),
    [
        ((), "at least one point"),
        (((0.0, 1.0), (0.0, 2.0)), "two points at 0"),
        (((0.0, math.nan),), "must be finite"),
        (((math.inf, 1.0),), "must be finite"),
    ],
)
def test_what_is_no_curve_is_refused(points, said):
    with pytest.raises(InputError, match=f"^curve: .*{said}"):
        Curve(points)


@pytest.mark.parametrize("added", [-0.1, 0.9, math.nan])
def test_a_curve_says_nothing_beyond_what_was_measured(added):
    with pytest.raises(InputError, match=r"lies outside 0\.1 … 0\.8"):
        Curve(((0.1, 3.0), (0.8, 1.0))).value_at(added)


# --------------------------------------------------------------------------------------------- by hand

FRAGILE = Curve(((0.0, 100.0), (0.1, 80.0), (0.3, 20.0), (1.0, 0.0)))
ROBUST = Curve(((0.0, 100.0), (0.1, 100.0), (0.3, 90.0), (1.0, 30.0)))


def test_two_curves_worked_by_hand():
    # At level 90 they take 0.05 + 0.3, at 80 0.1 + (0.3 + 0.7 / 6): of 0.4 the level is 90 - 10 * 0.05 / (1 / 6) = 87.
    found = allocate({"a": FRAGILE, "b": ROBUST}, {"a": 50, "b": 50}, 0.2)
    assert found.level == pytest.approx(87, rel=1e-14)
    assert found.sparsities == pytest.approx({"a": 0.065, "b": 0.335}, rel=1e-13)


def test_two_sizes_worked_by_hand():
    # At level 90 they take 3 * 0.05 + 0.3 of 4 * 0.1125, which is all.
    found = allocate({"a": FRAGILE, "b": ROBUST}, {"a": 300, "b": 100}, 0.1125)
    assert found.level == pytest.approx(90, rel=1e-13)
    assert found.sparsities == pytest.approx({"a": 0.05, "b": 0.3}, rel=1e-13)


def test_flat_pieces_at_the_level_share_what_is_left_in_proportion():
    wide = Curve(((0.0, 9.0), (0.4, 9.0), (1.0, 0.0)))
    narrow = Curve(((0.0, 9.0), (0.1, 9.0), (1.0, 0.0)))
    steep = Curve(((0.0, 9.0), (1.0, 0.0)))
    found = allocate({"w": wide, "n": narrow, "s": steep}, {"w": 1, "n": 1, "s": 1}, 0.1)
    assert found.level == 9
    assert found.sparsities == pytest.approx({"w": 0.24, "n": 0.06, "s": 0.0}, abs=1e-15)


def test_a_flat_piece_further_down_is_shared_too():
    # Down to level 5 "a" takes 0.25 and "b" 0.5; "a" then has 0.5 at no cost, of which 0.25 are needed.
    a = Curve(((0.0, 10.0), (0.25, 5.0), (0.75, 5.0), (1.0, 0.0)))
    b = Curve(((0.0, 10.0), (1.0, 0.0)))
    found = allocate({"a": a, "b": b}, {"a": 1, "b": 1}, 0.5)
    assert found == Allocation({"a": 0.5, "b": 0.5}, 5.0)


def test_one_that_can_take_no_more_is_left_as_it_is():
    full = Curve(((0.0, 8.0),))
    found = allocate({"full": full, "b": Curve(((0.0, 8.0), (1.0, 2.0)))}, {"full": 3, "b": 1}, 0.125)
    assert found == Allocation({"full": 0.0, "b": 0.5}, 5.0)


def test_one_that_is_lower_before_anything_is_added_limits_the_level_and_gets_nothing():
    low = Curve(((0.0, 3.0), (1.0, 0.0)))
    found = allocate({"low": low, "high": Curve(((0.0, 9.0), (1.0, 3.0)))}, {"low": 1, "high": 1}, 0.25)
    assert found == Allocation({"low": 0.0, "high": 0.5}, 3.0)


def test_nothing_and_everything():
    curves, sizes = {"a": FRAGILE, "b": ROBUST}, {"a": 1, "b": 7}
    assert allocate(curves, sizes, 0) == Allocation({"a": 0, "b": 0}, 100)
    assert allocate(curves, sizes, 1) == Allocation({"a": 1, "b": 1}, 0)


# --------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("mean", "said"),
    [
        (0.71, r"mean: 0\.71 cannot be reached; the largest that can is 0\.7$"),
        (0.7 + 1e-9, r"the largest that can is 0\.7$"),
        (0.09, r"mean: 0\.09 cannot be reached; the smallest that can is 0\.1$"),
        (-1, r"the smallest that can is 0\.1$"),
        (math.nan, "mean: must be a finite number, not nan"),
        (math.inf, "mean: must be a finite number, not inf"),
    ],
)
def test_a_mean_that_cannot_be_reached_is_refused_and_the_nearest_named(mean, said):
    curves = {"a": Curve(((0.1, 5.0), (0.6, 4.0))), "b": Curve(((0.1, 5.0), (0.8, 0.0)))}
    with pytest.raises(InputError, match=said):
        allocate(curves, {"a": 10, "b": 10}, mean)


def test_the_mean_that_is_named_can_be_asked_for():
    curves = {"a": Curve(((0.0, 5.0), (1 / 3, 4.0))), "b": Curve(((0.0, 5.0), (0.7, 0.0)))}
    with pytest.raises(InputError) as refused:
        allocate(curves, {"a": 10, "b": 13}, 1)
    named = float(str(refused.value).split()[-1])
    assert allocate(curves, {"a": 10, "b": 13}, named).sparsities == pytest.approx({"a": 1 / 3, "b": 0.7})


@pytest.mark.parametrize(
    ("curves", "sizes", "said"),
    [
        ({}, {}, "curves: at least one component"),
        ({"a": FRAGILE}, {}, "a: a component needs both a curve and a size"),
        ({"a": FRAGILE}, {"a": 1, "b": 2}, "b: a component needs both a curve and a size"),
        ({"a": FRAGILE}, {"a": -1}, "a: its size must be a number of parameters, not -1"),
        ({"a": FRAGILE}, {"a": math.nan}, "a: its size must be a number of parameters, not nan"),
        ({"a": FRAGILE}, {"a": 0}, "sizes: no parameters at all"),
    ],
)
def test_what_cannot_be_allocated_is_refused(curves, sizes, said):
    with pytest.raises(InputError, match=said):
        allocate(curves, sizes, 0.1)


# -------------------------------------------------------------------------------------- any curves at all


@st.composite
def curve(draw):
    """Up to five points on a coarse grid, so that levels coincide, flat pieces are common and some points rise."""
    places = draw(st.lists(st.integers(0, 10), min_size=1, max_size=5, unique=True))
    return Curve(tuple((place / 10, float(draw(st.integers(0, 12)))) for place in places))


ANY = curve()


@st.composite
def problem(draw, kind=ANY, most=4, least_size=0):
    """Curves, sizes and a mean that can be reached."""
    curves = {f"c{i}": each for i, each in enumerate(draw(st.lists(kind, min_size=1, max_size=most)))}
    sizes = {path: draw(st.integers(least_size, 9)) for path in curves}
    assume(any(sizes.values()))
    total = sum(sizes.values())
    lowest = sum(sizes[path] * each.smallest for path, each in curves.items()) / total
    highest = sum(sizes[path] * each.largest for path, each in curves.items()) / total
    share = draw(st.one_of(st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.floats(0, 1)))
    return curves, sizes, min(lowest + share * (highest - lowest), highest)


def mean_of(sizes, sparsities):
    return math.fsum(sizes[path] * each for path, each in sparsities.items()) / sum(sizes.values())


def by_numpy(curve, added):
    places, values = np.array(curve.points).T
    return np.interp(added, places, np.minimum.accumulate(values))


@settings(deadline=None)
@given(problem())
def test_the_budget_is_met_and_the_level_is_the_least_value(given_problem):
    curves, sizes, mean = given_problem
    found = allocate(curves, sizes, mean)
    assert list(found.sparsities) == list(curves)
    assert mean_of(sizes, found.sparsities) == pytest.approx(mean, rel=1e-12, abs=1e-300)
    for path, added in found.sparsities.items():
        assert curves[path].smallest <= added <= curves[path].largest
    values = [by_numpy(curves[path], added) for path, added in found.sparsities.items()]
    assert found.level == pytest.approx(min(values), rel=1e-12, abs=1e-12)


@settings(max_examples=150, deadline=None)
@given(problem(most=3, least_size=1))
def test_no_allocation_on_a_fine_grid_does_better(given_problem):
    """All but one component on a grid with every point of their curves; the last one takes what is left."""
    curves, sizes, mean = given_problem
    (*first, last), total = curves, sum(sizes.values())
    steps = 4001 if len(first) == 1 else 161
    grids = [np.linspace(curves[path].smallest, curves[path].largest, steps) for path in first]
    grids = [
        np.union1d(grid, [place for place, _ in curves[path].points])
        for path, grid in zip(first, grids, strict=True)
    ]
    taken = np.meshgrid(*grids, indexing="ij") if first else []
    rest = mean * total - sum(sizes[path] * each for path, each in zip(first, taken, strict=True))
    rest = np.asarray(rest / sizes[last])
    fits = (rest >= curves[last].smallest - 1e-12) & (rest <= curves[last].largest + 1e-12)
    values = [by_numpy(curves[path], each) for path, each in zip(first, taken, strict=True)]
    level = np.minimum.reduce([*values, by_numpy(curves[last], rest)])
    best = float(np.where(fits, level, -np.inf).max())
    found = allocate(curves, sizes, mean).level
    assert best <= found + 1e-9
    if len(first) == 1 and math.isfinite(best):  # and the grid is fine enough to come near
        slope = max(
            (y0 - y1) / (x1 - x0)
            for each in curves.values()
            for (x0, y0), (x1, y1) in itertools.pairwise([*each.points, (2.0, each.points[-1][1])])
        )
        width = (curves[first[0]].largest - curves[first[0]].smallest) / (steps - 1)
        assert best >= found - slope * width * max(1, sizes[first[0]] / sizes[last]) - 1e-9


@settings(deadline=None)
@given(problem(), st.floats(0, 1))
def test_a_larger_mean_gives_no_component_less_and_no_higher_level(given_problem, share):
    curves, sizes, mean = given_problem
    lowest = mean_of(sizes, {path: each.smallest for path, each in curves.items()})
    less, more = (allocate(curves, sizes, each) for each in (lowest + share * (mean - lowest), mean))
    assert all(less.sparsities[path] <= more.sparsities[path] + 1e-12 for path in curves)
    assert less.level >= more.level - 1e-9


@settings(deadline=None)
@given(problem(), st.randoms())
def test_the_order_of_the_components_does_not_matter(given_problem, draw):
    curves, sizes, mean = given_problem
    order = list(curves)
    draw.shuffle(order)
    one = allocate(curves, sizes, mean)
    other = allocate({path: curves[path] for path in order}, dict(reversed(sizes.items())), mean)
    assert (one.sparsities, one.level) == (other.sparsities, other.level)


# -------------------------------------------------------------------------- concave curves: the certificate


@st.composite
def concave_curve(draw):
    """Falls ever more steeply."""
    falls = sorted(draw(st.lists(st.integers(0, 8), max_size=4)))
    widths = [draw(st.integers(1, 3)) / 10 for _ in falls]
    places = itertools.accumulate(widths, initial=draw(st.sampled_from([0.0, 0.1])))
    values = itertools.accumulate(
        (-fall * 10 * width for fall, width in zip(falls, widths, strict=True)),
        initial=float(draw(st.integers(0, 12))),
    )
    return Curve(tuple(zip(places, values, strict=True)))


def dual(curves, sizes, mean, weights, price):
    """An upper bound on every allocation's level, from any weights of lines and any price of sparsity.

    The linear program, for curves that are the least of their lines y + m (s - x):

        maximise t   subject to   t <= y + m (s_c - x)  for every line of c,   sum(size_c s_c) / total = mean,
                                  smallest_c <= s_c <= largest_c

    Let t and s be feasible. t is at most each line, so at most their mean under weights >= 0 that add up to 1; adding
    price * (mean - sum(size_c s_c) / total), which is 0, changes nothing. What then stands before s_c is a number g_c,
    and g_c s_c is at most its larger value at the two ends of s_c's range. That is this function: t <= dual for every
    feasible t. So an allocation for which some weights and price give its own level is proved to be the best.

    Args:
        weights: (component, x, y, m) → weight of this line.
        price: any number.
    """
    assert all(weight >= 0 for weight in weights.values())
    assert math.fsum(weights.values()) == pytest.approx(1, rel=1e-12)
    total = sum(sizes.values())
    bound = price * mean + math.fsum(weight * (y - m * x) for (_, x, y, m), weight in weights.items())
    for path, each in curves.items():
        slope = math.fsum(weight * line[3] for line, weight in weights.items() if line[0] == path)
        g = slope - price * sizes[path] / total
        bound += max(g * each.smallest, g * each.largest)
    return bound


def line_at(path, curve, added):
    """The line of the curve at a place: of two that meet there, the one after it where there is one."""
    pieces = list(itertools.pairwise(curve.points)) or [
        (curve.points[0], (curve.smallest + 1, curve.points[0][1]))
    ]
    (x0, y0), (x1, y1) = next((piece for piece in pieces if added < piece[1][0]), pieces[-1])
    return path, x0, y0, (y1 - y0) / (x1 - x0)


def certificate(curves, sizes, found):
    """Weights and a price that prove the allocation, by the conditions that an optimum must fulfil.

    Weight goes only to components whose curve is at the level. If one is there before it takes anything, or on a flat
    line, the level is its curve's highest value, which nothing beats: weight 1, price 0. Otherwise each g_c of those
    that could take more must be 0, so that their weight is price * share_c / m_c, and the price follows as these add up
    to 1. Where none could take more, one of those at the level has the weight.
    """
    total = sum(sizes.values())
    at_the_level = [
        path
        for path, added in found.sparsities.items()
        if math.isclose(curves[path].value_at(added), found.level, rel_tol=1e-11, abs_tol=1e-11)
    ]
    for path in at_the_level:
        if math.isclose(curves[path].points[0][1], found.level, rel_tol=1e-11, abs_tol=1e-11):
            return {line_at(path, curves[path], curves[path].smallest): 1.0}, 0.0
    those = [path for path in at_the_level if found.sparsities[path] < curves[path].largest - 1e-12]
    lines = {path: line_at(path, curves[path], found.sparsities[path]) for path in those or at_the_level[:1]}
    price = 1 / math.fsum(sizes[path] / total / line[3] for path, line in lines.items())
    return {line: price * sizes[path] / total / line[3] for path, line in lines.items()}, price


@settings(max_examples=400, deadline=None)
@given(problem(concave_curve(), most=6, least_size=1))
def test_of_concave_curves_linear_programming_certifies_the_optimum(given_problem):
    curves, sizes, mean = given_problem
    found = allocate(curves, sizes, mean)
    weights, price = certificate(curves, sizes, found)
    assert dual(curves, sizes, mean, weights, price) == pytest.approx(found.level, rel=1e-9, abs=1e-9)
