import itertools
import json
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up import MadeUpEvaluator, N, int8

import dtm_fast as dtm
from dtm_fast.compression import name_of, parse_treatment
from dtm_fast.errors import ComponentError, InputError, TreatmentError
from dtm_fast.plan import Plan, Point, RecordedEvaluator
from dtm_fast.plan.beam import beam_search, check_beam, kept_by
from dtm_fast.plan.units import units
from dtm_fast.runs import Journal

INT8, HALF = dtm.Int8(), dtm.Prune(0.5)
BY = ("fdt75", "dppl", "perplexity", "kl")


@pytest.fixture
def journal(tmp_path):
    opened = Journal.open(tmp_path / "journal.sqlite", {"model": "m"})
    yield opened
    opened.close()


def chance(configuration, seed: int) -> int:
    """A made-up FDT, some 0 … N, of no regularity."""
    return random.Random(repr((name_of(configuration), seed))).randint(0, N)


def made_up(fdt_of, paths) -> MadeUpEvaluator:
    return MadeUpEvaluator(fdt_of, dict.fromkeys(paths, 3))


def extensions(parents, treatments, chosen_units):
    """By definition: each of them once."""
    found = {}
    for parent, unit, treatment in itertools.product(parents, chosen_units, treatments):
        if not set(unit) & set(parent):
            grown = {**parent, **dict.fromkeys(unit, treatment)}
            found[name_of(grown)] = grown
    return list(found.values())


def plain_beam(place_of, treatments, depth, width, chosen_units) -> list[list[dict]]:
    """By definition: everything is measured and sorted."""
    kept = [[{}]]
    for _ in range(depth):
        kept.append(sorted(extensions(kept[-1], treatments, chosen_units), key=place_of)[:width])
    return kept[1:]


# Alone "a" is best and "b" and "c" are the worst but one; together these two are best, and whatever is with "a" is bad.
PAIRS = {("b", "c"): 9, ("a", "b"): 3, ("a", "c"): 3, ("a", "d"): 4}
ALONE = {"a": 10, "b": 7, "c": 6, "d": 8, "e": 5}


def deceptive(configuration) -> int:
    if len(configuration) == 1:
        return ALONE[next(iter(configuration))]
    return PAIRS.get(tuple(sorted(configuration)), 2)


@pytest.mark.parametrize(("width", "expected"), [(1, {"a", "d"}), (10, {"b", "c"})])
def test_a_wide_beam_finds_the_optimum_that_the_greedy_search_misses(journal, width, expected):
    recorded = RecordedEvaluator(made_up(deceptive, ALONE), journal)
    best = max(deceptive(int8(*pair)) for pair in itertools.combinations(ALONE, 2))
    plan = beam_search(recorded, [INT8], 2, width=width)
    assert set(plan.configuration) == expected
    assert (plan.chosen.fdt75 == best) == (width == 10)
    assert [point.fdt75 for point in plan.curve] == [10, plan.chosen.fdt75]


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    depth=st.integers(1, 4),
    width=st.sampled_from([1, 2, 3, 10, 10_000]),
    by=st.sampled_from(BY),
    treatments=st.sampled_from([[INT8], [INT8, HALF], [HALF, INT8, HALF]]),
    together=st.booleans(),
)
def test_it_keeps_the_first_of_all_that_are_sorted(
    tmp_path_factory, seed, depth, width, by, treatments, together
):
    """With a width of 10,000 that is the optimum of all configurations of the depth."""
    chosen = [("a", "b"), ("c",), ("d", "e"), ("f",)] if together else [(path,) for path in "abcde"]
    evaluator = made_up(lambda configuration: chance(configuration, seed), "abcdef")
    opened = Journal.open(tmp_path_factory.mktemp("run") / "journal.sqlite", {})
    plan = beam_search(
        RecordedEvaluator(evaluator, opened), treatments, depth, width=width, by=by, units=chosen
    )
    opened.close()

    def place_of(configuration):  # the metrics fall as FDT rises
        return -chance(configuration, seed), name_of(configuration)

    expected = plain_beam(place_of, [INT8, HALF][: len(set(treatments))], depth, width, chosen)
    assert kept_by(plan) == expected
    assert plan.configuration == expected[-1][0]
    assert [point.fdt for point in plan.curve] == [chance(best[0], seed) for best in expected]
    if width == 10_000:
        every = [
            {path: treatment for unit, treatment in zip(some, mix, strict=True) for path in unit}
            for some in itertools.combinations(chosen, depth)
            for mix in itertools.product([INT8, HALF][: len(set(treatments))], repeat=depth)
        ]
        assert plan.configuration == min(every, key=place_of)


def test_what_several_extend_to_is_measured_once(journal):
    evaluator = made_up(lambda configuration: N - len(configuration), "abcdef")
    plan = beam_search(RecordedEvaluator(evaluator, journal), [INT8], 3, width=10)
    sizes = [len(configuration) for configuration in evaluator.measured]
    best_of_all_depths = 3  # measured once more, completely
    assert len(evaluator.measured) == 6 + 15 + len(
        extensions(kept_by(plan)[1], [INT8], units(evaluator.decoder))
    ) + (best_of_all_depths)
    assert max(sizes) == 3
    assert (
        len({name_of(configuration) for configuration in evaluator.measured})
        == len(sizes) - best_of_all_depths
    )


def test_mean_fdt_decides_where_fdt75_is_equal(journal):
    values = {"a": [0, 9, 9, 9], "b": [8, 9, 9, 9], "c": [4, 9, 9, 9], "d": [9, 9, 9, 8]}

    class Spread(MadeUpEvaluator):
        def iterate(self, configurations, metrics=()):
            for measurement in super().iterate(configurations, metrics):
                fdt = dtm.measure.Measurement.from_json(
                    measurement.to_json() | {"fdt": values[next(iter(measurement.configuration))]}
                ).fdt
                yield replace(measurement, fdt=fdt)

    recorded = RecordedEvaluator(Spread(lambda configuration: 9, dict.fromkeys(values, 1)), journal)
    plan = beam_search(recorded, [INT8], 1, width=3)
    assert kept_by(plan) == [[int8("b"), int8("d"), int8("c")]]


@pytest.mark.parametrize("among", [1, 2, 3, 99])
def test_among_looks_at_the_least_harmful_alone(journal, among):
    evaluator = made_up(deceptive, ALONE)
    plan = beam_search(RecordedEvaluator(evaluator, journal), [INT8], 2, width=10, among=among)
    order = ["a", "d", "b", "c", "e"]
    assert kept_by(plan)[0] == [int8(path) for path in order[:among]]
    pairs = {frozenset(each) for each in evaluator.measured if len(each) == 2}
    assert pairs == {
        frozenset((parent, path))
        for parent in order[:among]
        for path in [each for each in order if each != parent][:among]
    }


def test_a_unit_is_as_harmful_alone_as_under_the_treatment_that_harms_it_least(journal):
    alone = {("a", "int8"): 5, ("a", HALF.key): 6, ("b", "int8"): 0, ("b", HALF.key): 9, ("c", "int8"): 4}
    evaluator = made_up(
        lambda each: alone.get(name_of(each)[0], 1) if len(each) == 1 else chance(each, 0), "abc"
    )
    plan = beam_search(RecordedEvaluator(evaluator, journal), [INT8, HALF], 1, among=2)
    assert kept_by(plan) == [[{"b": HALF}, {"a": HALF}, {"a": INT8}, {"b": INT8}]]


def test_fused_units_are_never_half_treated(llama_evaluator, journal):
    chosen = units(llama_evaluator.decoder, fused=True)
    said = []
    recorded = RecordedEvaluator(llama_evaluator, journal, lambda m, known: said.append(m.configuration))
    plan = beam_search(recorded, [INT8, HALF], 3, width=4, units=chosen)
    for configuration in [*said, *itertools.chain(*kept_by(plan)), plan.configuration]:
        for unit in chosen:
            assert len({str(configuration.get(path)) for path in unit}) == 1
    assert {len(configuration) for configuration in kept_by(plan)[2]} - {3}  # some unit is not single


def test_the_plan_says_how_it_was_found_and_goes_through_json(journal):
    evaluator, said = made_up(deceptive, ALONE), []
    plan = beam_search(
        RecordedEvaluator(evaluator, journal),
        [INT8, INT8],
        2,
        width=2,
        by="dppl",
        among=4,
        on_depth=lambda depth, point: said.append((depth, point)),
    )
    assert (plan.search, plan.model) == ("beam", "m")
    assert plan.how == {
        "treatments": ["int8"],
        "depth": 2,
        "width": 2,
        "by": "dppl",
        "among": 4,
        "units": [[path] for path in ALONE],
        "kept": [[[0, "a", "int8"], [0, "d", "int8"]], [[0, "d", "int8"], [0, "b", "int8"]]],
    }
    assert kept_by(plan) == [[int8("a"), int8("d")], [int8("a", "d"), int8("a", "b")]]
    assert list(plan.configuration) == ["a", "d"]  # in the order in which they were treated
    assert plan.chosen == plan.curve[-1] == Point.of(evaluator.decoder, recorded_of(evaluator, plan))
    assert None not in (plan.chosen.sdt, plan.chosen.dppl, plan.curve[0].sdt, plan.curve[0].dppl)
    assert said == list(enumerate(plan.curve, 1))
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    assert kept_by(Plan.from_json(json.loads(json.dumps(plan.to_json())))) == kept_by(plan)


def recorded_of(evaluator, plan):
    return next(iter(evaluator.iterate([plan.configuration], ["dppl", "sdt"])))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"treatments": []}, "treatments: at least one"),
        ({"depth": 0}, r"depth: 1 … 5 \(units\), not 0"),
        ({"depth": 6}, r"depth: 1 … 5 \(units\), not 6"),
        ({"depth": 2, "units": [("a", "b")]}, r"depth: 1 … 1 \(units\), not 2"),
        ({"width": 0}, "width: at least 1 configuration to keep, not 0"),
        ({"among": 0}, "among: at least 1 unit to look at, not 0"),
        ({"by": "sdt"}, "no ranking 'sdt'; known: fdt75, dppl, perplexity, kl"),
        ({"units": [("a", "b"), ("c", "a")]}, "units: a stands in 2 places"),
        ({"units": [("a",), ()]}, "units: one has no component"),
    ],
    ids=str,
)
def test_what_cannot_be_meant_is_refused_before_anything_is_measured(journal, arguments, message):
    evaluator = made_up(deceptive, ALONE)
    given_arguments = {"treatments": [INT8], "depth": 1} | arguments
    with pytest.raises(InputError, match=message):
        beam_search(RecordedEvaluator(evaluator, journal), **given_arguments)
    assert evaluator.measured == []


def test_what_is_known_of_a_beam_without_its_units_is_checked():
    check_beam(99, 1, None)
    with pytest.raises(InputError, match="depth: at least 1 unit to treat, not 0"):
        check_beam(0, 1, None)


def test_a_treatment_or_a_unit_that_does_not_fit_is_named_before_anything_runs(llama_evaluator, journal):
    recorded = RecordedEvaluator(llama_evaluator, journal)
    with pytest.raises(
        TreatmentError, match=r"model\.layers\.0\.self_attn\.q_proj: 'int8' is not a treatment"
    ):
        beam_search(recorded, [INT8, "int8"], 1)
    with pytest.raises(ComponentError, match=r"the model has no component 'model\.layers\.9\.mlp\.up_proj'"):
        beam_search(
            recorded, [INT8], 1, units=[("model.layers.0.mlp.up_proj",), ("model.layers.9.mlp.up_proj",)]
        )
    assert len(journal) == 0


def test_a_treatment_must_fit_every_component_that_may_get_it(llama_evaluator, journal):
    int4, recorded = parse_treatment("int4(64)"), RecordedEvaluator(llama_evaluator, journal)
    with pytest.raises(TreatmentError, match=r"q_proj: int4\(64\) needs a K that is a multiple of 64"):
        beam_search(recorded, [INT8, int4], 1)
    assert len(journal) == 0
    down = [unit for unit in units(llama_evaluator.decoder) if unit[0].endswith("down_proj")]
    plan = beam_search(recorded, [INT8, int4], 2, units=down)
    assert {str(treatment.key) for kept in kept_by(plan)[0] for treatment in kept.values()} == {
        "int8",
        "int4(64)",
    }


@pytest.mark.parametrize("by", ["fdt75", "kl"])
def test_interrupted_after_any_number_of_measurements_it_ends_the_same_and_measures_nothing_twice(
    tmp_path, by
):
    def search(evaluator, opened):
        recorded = RecordedEvaluator(evaluator, opened)
        return beam_search(recorded, [INT8, HALF], 3, width=3, by=by).to_json()

    def evaluator() -> MadeUpEvaluator:
        return made_up(lambda configuration: chance(configuration, 4), "abcd")

    whole = Journal.open(tmp_path / "whole.sqlite", {})
    undisturbed = evaluator()
    expected = search(undisturbed, whole)
    whole.close()
    total = len(undisturbed.measured)
    assert total > 30
    part, measured, found = Journal.open(tmp_path / "part.sqlite", {}), [], None
    for _ in range(total):
        again = evaluator()
        again.fails_at = 1
        try:
            found = search(again, part)
        except KeyboardInterrupt:
            found = None
        measured += again.measured
    part.close()
    assert found == expected
    assert measured == undisturbed.measured


def test_finished_depths_are_skipped_at_once(journal):
    evaluator, said = made_up(lambda configuration: chance(configuration, 4), "abcd"), []
    first = beam_search(RecordedEvaluator(evaluator, journal), [INT8], 3, width=3)
    measured = len(evaluator.measured)
    recorded = RecordedEvaluator(
        evaluator, journal, lambda m, known: said.append((dict(m.configuration), known))
    )
    assert beam_search(recorded, [INT8], 3, width=3).to_json() == first.to_json()
    assert len(evaluator.measured) == measured
    assert said == [(best[0], True) for best in kept_by(first)]  # the curve, and no candidate is looked for


def test_a_deeper_search_goes_on_from_a_shallower_one(journal):
    evaluator = made_up(lambda configuration: chance(configuration, 4), "abcd")
    recorded = RecordedEvaluator(evaluator, journal)
    shallow = beam_search(recorded, [INT8], 2, width=3)
    measured = len(evaluator.measured)
    deep = beam_search(recorded, [INT8], 3, width=3)
    assert kept_by(deep)[:2] == kept_by(shallow)
    assert {len(configuration) for configuration in evaluator.measured[measured:]} == {3}


@pytest.mark.parametrize(
    "other",
    [
        {"width": 2},
        {"by": "dppl"},
        {"among": 2},
        {"treatments": [INT8, HALF]},
        {"treatments": [HALF]},
        {"units": [("a", "b"), ("c",), ("d",)]},
    ],
    ids=str,
)
def test_a_search_with_other_arguments_decides_for_itself(tmp_path, other):
    def search(opened, **arguments):
        evaluator = made_up(lambda configuration: chance(configuration, 7), "abcd")
        given_arguments = {"treatments": [INT8], "depth": 2, "width": 3} | arguments
        return beam_search(RecordedEvaluator(evaluator, opened), **given_arguments).to_json()

    shared, fresh = (Journal.open(tmp_path / f"{name}.sqlite", {}) for name in ("shared", "fresh"))
    search(shared)
    assert search(shared, **other) == search(fresh, **other)
    # Made-up metrics all rise and fall together, so that another ranking's decisions look the same.
    assert shared._connection.execute("SELECT count(*) FROM notes").fetchone() == (4,)
    shared.close()
    fresh.close()
