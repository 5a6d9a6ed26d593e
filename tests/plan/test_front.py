"""The Pareto front by its definition."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtm_fast.errors import InputError
from dtm_fast.plan.front import QUALITIES, front
from dtm_fast.plan.plan import Point

numbers = st.integers(0, 6).map(float)
points = st.lists(
    st.builds(
        Point, st.just(1), st.just(0.5), numbers, numbers, numbers, st.none() | numbers, st.none() | numbers
    )
)


@given(points, st.sampled_from([name for name in QUALITIES if name != "fdt75"]))
def test_no_point_is_beaten_and_every_other_is(all_points, by):
    quality = QUALITIES[by]
    found = front(all_points, by)
    known = [point for point in all_points if quality(point) is not None]
    for point in known:
        beaten = any(
            other.bits <= point.bits and quality(other) >= quality(point) and other != point
            for other in found
        )
        assert (point in found) or beaten
    for one, two in pairwise(found):
        assert one.bits < two.bits
        assert quality(one) < quality(two)


@given(points)
def test_fdt75_is_decided_by_mean_fdt_where_it_is_equal(all_points):
    found = front(all_points, "fdt75")
    pairs = [(point.fdt75, point.fdt) for point in found]
    assert pairs == sorted(set(pairs))
    for point in all_points:
        assert any(o.bits <= point.bits and (o.fdt75, o.fdt) >= (point.fdt75, point.fdt) for o in found)


def test_of_equals_the_first_stays():
    one, two = (Point(n, 0.5, 8.0, 10.0, 9.0, 1.0, None) for n in (1, 2))
    assert front([one, two]) == [one]
    assert front([one], "dppl") == []


def test_of_equal_size_and_fdt75_the_higher_mean_fdt_stays():
    low, high = (Point(1, 0.5, 8.0, 5.0, fdt, 1.0, None) for fdt in (1.0, 2.0))
    assert front([low, high], "fdt75") == front([high, low], "fdt75") == [high]


def test_an_unknown_quality_is_refused_by_name():
    with pytest.raises(InputError, match=r"no quality 'nope'; known: fdt75, fdt, sdt, dppl"):
        front([], "nope")
