import pytest
from made_up import MadeUpEvaluator, int8

from dtm_fast.compression import configuration_identity
from dtm_fast.plan import RecordedEvaluator
from dtm_fast.runs import Journal

A, B, C = int8("a"), int8("b"), int8("c")


@pytest.fixture
def journal(tmp_path):
    opened = Journal.open(tmp_path / "journal.sqlite", {"model": "m"})
    yield opened
    opened.close()


@pytest.fixture
def evaluator() -> MadeUpEvaluator:
    return MadeUpEvaluator(lambda configuration: 9 - len(configuration), {"a": 1, "b": 1, "c": 1})


def test_what_is_known_is_not_measured_again(journal, evaluator):
    first = RecordedEvaluator(evaluator, journal).measure([A, B])
    again = RecordedEvaluator(evaluator, journal).measure([B, A, C])
    assert evaluator.measured == [A, B, C]
    assert [m.configuration for m in again] == [B, A, C]
    assert again[1].to_json() == first[0].to_json()


def test_a_configuration_asked_for_twice_is_measured_once(journal, evaluator):
    found = RecordedEvaluator(evaluator, journal).measure([A, B, A])
    assert evaluator.measured == [A, B]
    assert found[0] is found[2]


def test_a_configuration_in_another_order_is_the_same(journal, evaluator):
    recorded = RecordedEvaluator(evaluator, journal)
    recorded.measure([int8("a", "b")])
    recorded.measure([int8("b", "a")])
    assert len(evaluator.measured) == 1


def test_each_is_committed_before_the_next_begins(journal, evaluator):
    evaluator.fails_at = 2
    with pytest.raises(KeyboardInterrupt):
        RecordedEvaluator(evaluator, journal).measure([A, B, C])
    assert len(journal) == 2
    evaluator.fails_at = None
    RecordedEvaluator(evaluator, journal).measure([A, B, C])
    assert evaluator.measured == [A, B, C]


def test_other_metrics_are_measured_and_the_old_row_stays(journal, evaluator):
    recorded = RecordedEvaluator(evaluator, journal)
    (old,) = recorded.measure([A], ["dppl"])
    (new,) = recorded.measure([A], ["dppl", "perplexity"])
    assert (old.perplexity, new.perplexity is None) == (None, False)
    assert len(evaluator.measured) == len(journal) == 2
    assert next(iter(journal)) == old.to_json()


def test_more_metrics_than_asked_for_will_do(journal, evaluator):
    recorded = RecordedEvaluator(evaluator, journal)
    recorded.measure([A], ["perplexity", "dppl"])
    recorded.measure([A], ["dppl"])
    recorded.measure([A], [])
    recorded.measure([A], ["dppl", "perplexity"])
    assert len(evaluator.measured) == 1


def test_it_says_what_was_known_and_what_was_measured(journal, evaluator):
    RecordedEvaluator(evaluator, journal).measure([A])
    said = []
    recorded = RecordedEvaluator(evaluator, journal, lambda m, known: said.append((m.configuration, known)))
    recorded.measure([A, B])
    assert said == [(A, True), (B, False)]


def test_an_evaluator_may_measure_in_its_own_order(journal, evaluator):
    plain = evaluator.iterate
    evaluator.iterate = lambda configurations, metrics: plain(reversed(list(configurations)), metrics)
    found = RecordedEvaluator(evaluator, journal).measure([A, B, C])
    assert evaluator.measured == [C, B, A]
    assert [m.configuration for m in found] == [A, B, C]


def test_the_journal_keeps_it_under_its_identity(journal, evaluator):
    (found,) = RecordedEvaluator(evaluator, journal).measure([A])
    assert journal.find(configuration_identity(A), ["dppl"]) == found.to_json()
