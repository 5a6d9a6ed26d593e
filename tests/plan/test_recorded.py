from dataclasses import replace

import pytest
from made_up import MadeUpEvaluator, int8

import dtm_fast as dtm
from dtm_fast.compression import configuration_identity, name_of
from dtm_fast.errors import ComponentError
from dtm_fast.measure.racing import fdt75
from dtm_fast.ops.layer_weights import Arithmetic, has_arithmetic
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
    (found,) = RecordedEvaluator(evaluator, journal).measure([A], ["dppl"])
    assert journal.find(configuration_identity(A), ["dppl"]) == found.to_json()


@pytest.fixture
def racer(llama, make_probes) -> dtm.Evaluator:
    if not has_arithmetic(Arithmetic.FLOAT32):
        pytest.skip("the instruction set in use has no kernel for fused layers")
    return dtm.Evaluator(llama, make_probes(llama, 9), layers="fused")


def halves(evaluator: dtm.Evaluator) -> list[dict]:
    return [{path: dtm.Prune(0.5)} for path in evaluator.decoder.components]


def test_a_race_keeps_everyones_result_and_reads_nobody_again(journal, racer):
    candidates = halves(racer)
    race = RecordedEvaluator(racer, journal).best(candidates, 3)
    measured = set()
    for each in candidates:
        identity = configuration_identity(each)
        stored, bound = journal.find(identity, []), journal.bound(identity)
        assert (stored is None) != (bound is None)
        measured |= {identity} if stored is not None else set()
    assert {configuration_identity(each.configuration) for each in race.best} <= measured
    before = racer.layer_evaluations
    again = RecordedEvaluator(racer, journal).best(candidates, 3)
    assert [each.to_json() for each in again.best] == [each.to_json() for each in race.best]
    assert len(again.best) + len(again.dropped) == len(candidates)
    assert racer.layer_evaluations == before


def test_a_wider_race_reads_on_where_old_bounds_do_not_suffice(journal, racer):
    candidates = halves(racer)
    RecordedEvaluator(racer, journal).best(candidates, 1)
    wider = RecordedEvaluator(racer, journal).best(candidates, 6)
    fresh = racer.best(candidates, 6)
    assert [each.configuration for each in wider.best] == [each.configuration for each in fresh.best]
    assert [fdt75(each.fdt) for each in wider.best] == [fdt75(each.fdt) for each in fresh.best]


def test_a_race_that_is_ended_goes_on_with_what_it_knows(journal, racer):
    candidates, finished = halves(racer), []

    class EndedError(Exception):
        pass

    def end_after_two(measurement, known):
        finished.append(measurement.configuration)
        if len(finished) == 2:
            raise EndedError

    with pytest.raises(EndedError):
        RecordedEvaluator(racer, journal, end_after_two).best(candidates, 3)
    said = []
    race = RecordedEvaluator(racer, journal, lambda m, known: said.append((m.configuration, known))).best(
        candidates, 3
    )
    known = [configuration for configuration, known in said if known]
    assert sorted(map(name_of, known)) == sorted(map(name_of, finished))
    assert [each.configuration for each in race.best] == [
        each.configuration for each in racer.best(candidates, 3).best
    ]


def test_from_rebased_states_the_same_is_measured_into_the_same_journal(journal, racer):
    said = []
    recorded = RecordedEvaluator(racer, journal, lambda m, known: said.append(known))
    paths = list(racer.decoder.components)
    parent = dict.fromkeys(paths[::2], dtm.Prune(0.4))
    children = [parent | {path: dtm.Prune(0.6)} for path in paths]
    rebased = recorded.rebased(parent)
    assert rebased.evaluator is not racer
    found = rebased.measure([parent, *children], ())
    expected = racer.measure([parent, *children], ())
    assert [each.fdt.tolist() for each in found] == [each.fdt.tolist() for each in expected]
    assert len(journal) == len(said) == 1 + len(children)
    assert not any(said)
    before = racer.layer_evaluations
    assert [each.to_json() for each in recorded.measure(children, ())] == [
        each.to_json() for each in found[1:]
    ]
    assert racer.layer_evaluations == before
    other = recorded.rebased(children[0], instead_of=rebased)
    assert other.measure(children, ())[0].fdt.tolist() == expected[1].fdt.tolist()


def test_where_no_states_can_be_kept_it_measures_as_before(journal, evaluator, llama, make_probes):
    made_up = RecordedEvaluator(evaluator, journal)
    assert made_up.rebased(A) is made_up
    path = dtm.components(llama)[0]
    plain = RecordedEvaluator(dtm.Evaluator(llama, make_probes(llama), layers="transformers"), journal)
    assert plain.rebased({path: dtm.Prune(0.5)}) is plain


def test_states_of_what_does_not_fit_the_model_or_in_place_of_anothers_are_refused(
    journal, racer, evaluator, tmp_path
):
    recorded = RecordedEvaluator(racer, journal)
    with pytest.raises(ComponentError, match="no component 'a'"):
        recorded.rebased(A)
    other = Journal.open(tmp_path / "other.sqlite", {})
    with pytest.raises(ValueError, match="instead_of was not made from this evaluator"):
        recorded.rebased({}, instead_of=RecordedEvaluator(evaluator, other))
    other.close()


def test_a_race_needs_the_fast_evaluator(journal, evaluator):
    with pytest.raises(ValueError, match=r"a race needs dtm_fast\.Evaluator, not MadeUpEvaluator"):
        RecordedEvaluator(evaluator, journal).best([A], 1)


def test_sdt_is_known_wherever_it_was_measured(journal, evaluator):
    recorded = RecordedEvaluator(evaluator, journal)
    recorded.measure([A], ["dppl"])  # the made-up evaluator measures it always, as the reference does
    recorded.measure([A], ["sdt"])
    recorded.measure([A], ["dppl", "sdt"])
    assert len(evaluator.measured) == 1


def test_a_guess_takes_no_proofs_place(journal, racer):
    candidates = halves(racer)
    race = RecordedEvaluator(racer, journal).best(candidates, 2)
    proved = next(each for each in race.dropped if each.proved)
    guess = replace(proved, proved=False, highest=proved.highest - 1)
    identity = configuration_identity(proved.configuration)
    journal.add_bound(identity, proved.to_json())

    def says(wanted, k, *, on_finished, **_):
        on_finished(guess)
        return race

    racer.best = says
    RecordedEvaluator(racer, journal).best(candidates, 2)
    assert journal.bound(identity) == proved.to_json()


def test_who_was_measured_and_is_not_among_the_best_was_read_to_the_first_divergence(racer):
    known = racer.measure(halves(racer), ())
    race = racer.best(halves(racer), 2, known=known)
    fdt = {name_of(each.configuration): each.fdt for each in known}
    assert len(race.dropped) == len(known) - 2
    for each in race.dropped:
        own = fdt[name_of(each.configuration)]
        assert (each.highest, each.highest_mean) == (fdt75(own), float(own.double().mean()))
        assert each.seen.tolist() == [min(at + 1, 12) for at in own.tolist()]
