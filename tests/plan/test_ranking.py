import pytest
from made_up import measurement_of

from dtm_fast.plan import RANKINGS, metrics_for, rank
from dtm_fast.plan.ranking import _KEYS, mean_of


def test_by_fdt75_the_highest_comes_first():
    measured = {
        "a": measurement_of([0, 0, 5, 5]),
        "b": measurement_of([9, 9, 9, 9]),
        "c": measurement_of([0, 0, 7, 7]),
    }
    assert rank(measured) == ["b", "c", "a"]


def test_of_equal_fdt75_the_higher_mean_comes_first():
    measured = {"a": measurement_of([0, 0, 10, 10, 10]), "b": measurement_of([0, 1, 10, 10, 10])}
    assert rank(measured) == ["b", "a"]


def test_of_equal_fdt_the_lower_sdt_comes_first():
    measured = {
        "a": measurement_of([2, 2], [8, 8]),
        "b": measurement_of([2, 2], [1, 8]),
        "c": measurement_of([2, 2], [1, 1]),
    }
    assert rank(measured) == ["c", "b", "a"]


def test_equals_stand_by_name_whatever_their_order():
    same = measurement_of([3, 4])
    assert rank({"b": same, "c": same, "a": same}) == ["a", "b", "c"]


@pytest.mark.parametrize("by", ["dppl", "perplexity", "kl"])
def test_by_other_metrics_the_lowest_mean_comes_first(by):
    measured = {
        "a": measurement_of([1, 1], **{by: [2.0, 4.0]}),
        "b": measurement_of([1, 1], **{by: [1.0, 4.5]}),
        "c": measurement_of([9, 9], **{by: [9.0, 9.0]}),
    }
    assert rank(measured, by) == ["b", "a", "c"]


def test_every_ranking_has_a_key_and_its_metric_is_measured():
    assert set(RANKINGS) == set(_KEYS)
    assert {by: metrics_for(by) for by in RANKINGS} == {
        "fdt75": ["dppl", "sdt"],
        "dppl": ["dppl", "sdt"],
        "perplexity": ["dppl", "perplexity", "sdt"],
        "kl": ["dppl", "kl", "sdt"],
    }


def test_a_mean_is_that_of_summaries():
    measured = measurement_of([1, 2, 2], dppl=[1.1, 2.3, 7.9])
    for metric in ("fdt", "sdt", "dppl"):
        assert mean_of(measured, metric) == measured.summary(metric).mean
