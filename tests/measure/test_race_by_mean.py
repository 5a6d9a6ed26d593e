"""Races that mean FDT decides where FDT_75 is equal, on a tiny model."""

import random
from dataclasses import replace

import pytest
from measurements import needs_kernels, some

import dtm_fast as dtm
from dtm_fast.compression import configuration_identity, name_of
from dtm_fast.measure.racing import Dropped, fdt75
from dtm_fast.plan import RecordedEvaluator
from dtm_fast.runs import Journal

pytestmark = needs_kernels


@pytest.fixture
def evaluator(llama, make_probes) -> dtm.Evaluator:
    return dtm.Evaluator(llama, make_probes(llama, 9), layers="fused")


@pytest.fixture
def candidates(evaluator, draw_configuration) -> list[dict]:
    """Many of equal FDT_75, as at the first depths of a beam search."""
    paths = list(evaluator.decoder.components)
    singles = [{path: treatment} for path in paths for treatment in (dtm.Int8(), dtm.Prune(0.2))]
    return list(
        {name_of(each): each for each in [*singles, *some(paths, draw_configuration, 20, 3)]}.values()
    )


@pytest.fixture
def ranked(evaluator, candidates) -> list[dtm.Measurement]:
    measured = evaluator.measure(candidates, ())
    return sorted(
        measured, key=lambda m: (-fdt75(m.fdt), -float(m.fdt.double().mean()), name_of(m.configuration))
    )


def of(measurements) -> list[tuple]:
    return [(name_of(m.configuration), m.fdt.tolist()) for m in measurements]


@pytest.mark.parametrize("k", [1, 5, 1000])
def test_the_best_are_the_first_of_all_that_are_sorted(evaluator, candidates, ranked, k):
    race = evaluator.best(candidates, k, by="fdt75+mean")
    assert of(race.best) == of(ranked[:k])
    assert len(race.best) + len(race.dropped) == len(candidates)
    by_name = {name_of(m.configuration): m for m in ranked}
    for dropped in race.dropped:
        measured = by_name[name_of(dropped.configuration)]
        assert dropped.proved
        assert dropped.highest >= fdt75(measured.fdt)
        assert dropped.highest_mean >= float(measured.fdt.double().mean())


def test_names_do_not_fill_the_places_of_the_best(evaluator, candidates, ranked):
    """With FDT_75 alone they do."""
    by_name, by_mean = (of(evaluator.best(candidates, 4, by=by).best) for by in ("fdt75", "fdt75+mean"))
    assert by_name != by_mean == of(ranked[:4])


@pytest.mark.parametrize("seed", range(2))
def test_what_earlier_races_found_changes_what_is_read_and_not_who_wins(evaluator, candidates, ranked, seed):
    draw = random.Random(seed)
    known: dict[tuple, dtm.Measurement | Dropped] = {}
    for by in ("fdt75", "fdt75+mean"):
        part = draw.sample(candidates, 25)
        race = evaluator.best(part, draw.randint(1, 5), by=by)
        for each in (*race.dropped, *race.best):
            if isinstance(each, Dropped) and draw.random() < 0.5:
                each = replace(each, highest_mean=None)  # a row of an earlier version
            known[name_of(each.configuration)] = each
    before = evaluator.layer_evaluations
    race = evaluator.best(candidates, 6, by="fdt75+mean", known=list(known.values()))
    assert of(race.best) == of(ranked[:6])
    with_known = evaluator.layer_evaluations - before
    evaluator.best(candidates, 6, by="fdt75+mean")
    assert with_known <= evaluator.layer_evaluations - before - with_known


def test_the_most_promising_given_first_least_is_read(evaluator, ranked):
    singles = [m.configuration for m in ranked if len(m.configuration) == 1]

    def read(configurations):
        race = evaluator.best(configurations, 4, by="fdt75+mean")
        return sum(int(dropped.seen.sum()) for dropped in race.dropped)

    assert read(singles) < read(singles[::-1])


def test_a_journal_of_an_earlier_version_of_rows_ends_the_same(evaluator, candidates, ranked, tmp_path):
    journal = Journal.open(tmp_path / "journal.sqlite", {})
    recorded = RecordedEvaluator(evaluator, journal)
    recorded.best(candidates, 2)
    stripped = 0
    for each in candidates:
        bound = journal.bound(configuration_identity(each))
        if bound is not None:
            del bound["highest_mean"]
            journal.add_bound(configuration_identity(each), bound)
            stripped += 1
    assert stripped > 5
    assert of(recorded.best(candidates, 8, by="fdt75+mean").best) == of(ranked[:8])
    before = evaluator.layer_evaluations
    assert of(recorded.best(candidates, 8, by="fdt75+mean").best) == of(ranked[:8])
    assert evaluator.layer_evaluations == before
    journal.close()


def test_what_decides_a_race_must_be_known(evaluator):
    with pytest.raises(ValueError, match=r"a race is decided by fdt75 or fdt75\+mean, not by 'sdt'"):
        evaluator.best([{}], 1, by="sdt")
