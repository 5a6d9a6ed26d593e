"""The paper's pruning rounds, on an evaluator whose optimum is known and on tiny models."""

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from journal_rows import finished
from made_up import MadeUpEvaluator, N

import dtm_fast as dtm
from dtm_fast.compression import Prune
from dtm_fast.errors import ComponentError, InputError, TreatmentError
from dtm_fast.ops.layer_weights import Arithmetic, has_arithmetic
from dtm_fast.plan import Plan, Point, RecordedEvaluator
from dtm_fast.plan.allocation import Curve
from dtm_fast.plan.pruning_rounds import (
    PAPER_STEPS,
    _sparsity,
    _whole,
    check_steps,
    probe_round,
    prune_in_rounds,
    uniform,
)
from dtm_fast.runs import Journal

# How FDT falls with the sparsity of each; together they have the least that one of them has alone.
FALLS = {
    "fragile": [(0, 10), (0.1, 8), (0.3, 4), (1, 0)],
    "robust": [(0, 10), (0.3, 10), (1, 0)],
}


def fdt_of(configuration):
    values = [Curve(tuple(FALLS[path])).value_at(each.sparsity) for path, each in configuration.items()]
    return min((math.floor(value) for value in values), default=N)


def made_up(sizes=None, **options) -> MadeUpEvaluator:
    return MadeUpEvaluator(fdt_of, sizes or {"fragile": 1000, "robust": 1000}, **options)


@pytest.fixture
def journal(tmp_path):
    opened = Journal.open(tmp_path / "journal.sqlite", {"model": "m"})
    yield opened
    opened.close()


def counts(sizes, sparsities):
    """How many weights ``Prune`` drops."""
    return {path: round(sparsities[path] * size) for path, size in sizes.items()}


# --------------------------------------------------------------------------------------------- one round


def test_a_round_measures_each_component_at_the_papers_points(journal):
    evaluator = made_up()
    probe_round(RecordedEvaluator(evaluator, journal), {}, 0.2)
    assert evaluator.measured == [
        {},
        *({"fragile": Prune(sparsity)} for sparsity in (0.1, 0.3, 1.0)),
        *({"robust": Prune(sparsity)} for sparsity in (0.1, 0.3, 1.0)),
    ]
    assert [row["configuration"] for row in journal][1] == {"fragile": "prune(0.1)"}


def test_a_round_worked_by_hand(journal):
    """At level 10 they take 0 + 0.3, at 8 0.1 + (0.3 + 0.14): of 0.4 the level is 10 - 2 * 0.1 / 0.24."""
    found = probe_round(RecordedEvaluator(made_up(), journal), {}, 0.2)
    assert found.points == {
        "fragile": [[0, 10], [0.1, 8], [0.3, 4], [1, 0]],
        "robust": [[0, 10], [0.1, 10], [0.3, 10], [1, 0]],
    }
    assert found.level == pytest.approx(10 - 2 * 0.1 / 0.24, rel=1e-13)
    # 1000 * 0.1 * 0.1 / 0.24 = 41.67 and 300 + 58.33 weights: the larger remainder gets the one that is missing.
    assert found.sparsities == {"fragile": 0.042, "robust": 0.358}
    assert found.configuration == {"fragile": Prune(0.042), "robust": Prune(0.358)}
    assert (found.step, found.current) == (0.2, {"fragile": 0.0, "robust": 0.0})


def test_the_others_stay_at_their_current_sparsity(journal):
    evaluator = made_up()
    found = probe_round(RecordedEvaluator(evaluator, journal), {"robust": 0.3}, 0.2)
    assert evaluator.measured[0] == {"robust": Prune(0.3)}
    assert evaluator.measured[1:4] == [
        {"robust": Prune(0.3), "fragile": Prune(each)} for each in (0.1, 0.3, 1.0)
    ]
    assert evaluator.measured[4:] == [{"robust": Prune(each)} for each in (0.4, 0.6, 1.0)]
    assert found.current == {"fragile": 0.0, "robust": 0.3}
    assert [added for added, _ in found.points["robust"]] == [0, 0.1, 0.3, 0.7]


def test_points_beyond_everything_are_that_and_measured_once(journal):
    evaluator = made_up()
    found = probe_round(RecordedEvaluator(evaluator, journal), {"fragile": 1.0, "robust": 0.9}, 0.05)
    assert evaluator.measured == [
        {"fragile": Prune(1.0), "robust": Prune(0.9)},
        {"fragile": Prune(1.0), "robust": Prune(0.925)},
        {"fragile": Prune(1.0), "robust": Prune(0.975)},
        {"fragile": Prune(1.0), "robust": Prune(1.0)},
    ]
    assert found.points["fragile"] == [[0, 0]]
    assert found.sparsities == {"fragile": 1.0, "robust": 1.0}
    evaluator.measured.clear()
    probe_round(RecordedEvaluator(evaluator, journal), {"fragile": 1.0, "robust": 0.5}, 0.25)
    assert [each["robust"].sparsity for each in evaluator.measured] == [0.5, 0.625, 0.875]


def test_components_weigh_by_their_parameters(journal):
    sizes = {"fragile": 3000, "robust": 1000}
    found = probe_round(RecordedEvaluator(made_up(sizes), journal), {}, 0.2)
    # At level 8 they take 300 + 440 weights, at 4 900 + 720: of 800 the level is 8 - 4 * 60 / 880.
    assert found.level == pytest.approx(8 - 4 * 60 / 880, rel=1e-13)
    assert sum(counts(sizes, found.sparsities).values()) == 800


def test_fdt_alone_is_measured(journal):
    asked = []
    evaluator = made_up()
    iterate = evaluator.iterate
    evaluator.iterate = lambda configurations, metrics: (
        asked.append(metrics) or iterate(configurations, metrics)
    )
    probe_round(RecordedEvaluator(evaluator, journal), {"robust": 0.1}, 0.2)
    assert asked == [()]


# ----------------------------------------------------------------------------------------- whole weights


@settings(deadline=None)
@given(st.integers(1, 10**9).flatmap(lambda size: st.tuples(st.integers(0, size), st.just(size))))
def test_a_sparsity_has_the_fewest_decimals_that_drop_so_many(case):
    dropped, size = case
    found = _sparsity(dropped, size)
    assert 0 <= found <= 1
    assert round(found * size) == dropped
    decimals = next(places for places in range(18) if round(found, places) == found)
    scale = 10 ** (decimals - 1)
    for shorter in (math.floor, math.ceil) if decimals else ():
        assert round(shorter(dropped / size * scale) / scale * size) != dropped


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 50), st.floats(0, 1)), min_size=1, max_size=8), st.floats(0, 1))
def test_whole_weights_add_up_to_the_budget_and_are_less_than_one_from_their_shares(parts, budget):
    most = {str(i): each for i, (each, _) in enumerate(parts)}
    total = round(budget * sum(most.values()))
    low = {str(i): each * share for i, (each, share) in enumerate(parts)}
    # Any shares that add up to the total: somewhere between nothing, these, and all that there is.
    begin, end = (low, most) if sum(low.values()) <= total else (dict.fromkeys(low, 0.0), low)
    width = sum(end.values()) - sum(begin.values())
    way = (total - sum(begin.values())) / width if width > 1e-6 else 0.0
    shares = {path: begin[path] + way * (end[path] - begin[path]) for path in most}
    assume(math.isclose(sum(shares.values()), total, abs_tol=1e-9))
    found = _whole(shares, most, total)
    assert sum(found.values()) == total
    for path, share in shares.items():
        assert 0 <= found[path] <= most[path]
        assert abs(found[path] - share) < 1 + 1e-9


# ---------------------------------------------------------------------------------------------- all rounds


def test_the_papers_steps_end_at_75_percent(journal):
    plan = prune_in_rounds(RecordedEvaluator(made_up(), journal))
    assert plan.search == "pruning rounds"
    assert plan.model == "m"
    assert plan.how["steps"] == list(PAPER_STEPS)
    assert len(plan.how["rounds"]) == len(plan.curve) == 8
    totals = []
    for one, after in zip(plan.how["rounds"], [*plan.how["rounds"][1:], None], strict=True):
        dropped = counts({"fragile": 1000, "robust": 1000}, one["sparsities"])
        totals.append(sum(dropped.values()) / 2000)
        assert all(one["current"][path] <= one["sparsities"][path] <= 1 for path in dropped)
        assert after is None or after["current"] == one["sparsities"]
    assert totals == [0.2, 0.35, 0.45, 0.55, 0.6, 0.65, 0.7, 0.75]
    assert plan.configuration == {path: Prune(each) for path, each in one["sparsities"].items()}
    assert plan.chosen == plan.curve[-1]
    assert plan.chosen.fdt75 == fdt_of(plan.configuration)
    assert plan.chosen.dppl == 1 + N - plan.chosen.fdt75
    assert plan.chosen.sdt == N - plan.chosen.fdt75
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_the_robust_one_is_pruned_further_than_uniformly_and_that_keeps_more(journal):
    recorded = RecordedEvaluator(made_up(), journal)
    plan = prune_in_rounds(recorded, (0.2, 0.15))
    same = uniform(recorded.decoder, 0.35)
    assert same == {"fragile": Prune(0.35), "robust": Prune(0.35)}
    # Of 0.7 in all the best is 10 - 20 s = 10 - (0.4 - s) / 0.07, at s = 1 / 6: FDT 6.67, of which 6 is measured.
    assert (fdt_of(same), plan.chosen.fdt75) == (3, 6)
    assert plan.configuration["fragile"].sparsity == pytest.approx(1 / 6, abs=0.01)


def test_uniform_pruning_is_measured_beside_each_round_where_asked_for(journal):
    evaluator = made_up()
    recorded = RecordedEvaluator(evaluator, journal)
    alone = prune_in_rounds(recorded, (0.2, 0.15))
    count = len(evaluator.measured)
    plan = prune_in_rounds(recorded, (0.2, 0.15), beside_uniform=True)
    assert len(evaluator.measured) == count + 2
    points = plan.how.pop("uniform")
    assert plan == alone
    for point, share in zip(points, (0.2, 0.35), strict=True):
        (found,) = recorded.measure([uniform(recorded.decoder, share)], ("dppl",))
        assert Point(**point) == Point.of(recorded.decoder, found)
    assert points[1]["fdt75"] == 3 < plan.chosen.fdt75
    assert len(evaluator.measured) == count + 2


def test_uniform_pruning_of_nothing_is_the_base(journal):
    plan = prune_in_rounds(RecordedEvaluator(made_up(), journal), [1e-5], beside_uniform=True)
    assert (plan.how["uniform"][0]["components"], plan.how["uniform"][0]["fdt"]) == (0, N)


def test_rounding_does_not_add_up_over_rounds(journal):
    sizes = {"fragile": 7, "robust": 10}
    plan = prune_in_rounds(RecordedEvaluator(made_up(sizes), journal), [0.1] * 10)
    for number, one in enumerate(plan.how["rounds"], 1):
        assert abs(sum(counts(sizes, one["sparsities"]).values()) - 17 * number / 10) <= 0.5 + 1e-9
    assert plan.configuration == {"fragile": Prune(1.0), "robust": Prune(1.0)}


def test_steps_of_less_than_a_weight_end_in_an_empty_plan(journal):
    plan = prune_in_rounds(RecordedEvaluator(made_up(), journal), [1e-5])
    assert (plan.configuration, plan.chosen) == ({}, None)
    assert len(plan.curve) == 1


def test_nothing_is_measured_twice_and_the_plan_is_the_same_when_planned_again(journal):
    evaluator = made_up()
    first = prune_in_rounds(RecordedEvaluator(evaluator, journal), (0.2, 0.15))
    # The base, six points, the joint configuration (the next round's point at 0), six points beside it, the last one.
    assert len(evaluator.measured) == 1 + 6 + 1 + 6 + 1
    assert prune_in_rounds(RecordedEvaluator(evaluator, journal), (0.2, 0.15)) == first
    assert len(evaluator.measured) == 15


def test_a_plan_interrupted_anywhere_ends_the_same_and_measures_nothing_twice(tmp_path):
    steps = (0.2, 0.15, 0.1)
    whole = Journal.open(tmp_path / "whole.sqlite", {})
    evaluator = made_up()
    expected = prune_in_rounds(RecordedEvaluator(evaluator, whole), steps).to_json()
    total = len(evaluator.measured)
    whole.close()
    part = Journal.open(tmp_path / "part.sqlite", {})
    measured = 0
    for fails_at in range(total):
        evaluator = made_up(fails_at=1 if fails_at < total - 1 else None)
        try:
            found = prune_in_rounds(RecordedEvaluator(evaluator, part), steps).to_json()
        except KeyboardInterrupt:
            found = None
        measured += len(evaluator.measured)
    part.close()
    assert found == expected
    assert measured == total


# ----------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ([], "steps: at least one"),
        ([0.2, 0.0], "steps: each must be above 0, not 0"),
        ([-0.1], r"steps: each must be above 0, not -0\.1"),
        ([math.nan], "steps: each must be above 0, not nan"),
        ([0.6, 0.5], r"steps: they may add up to 1, not to 1\.1"),
        ([math.inf], "steps: they may add up to 1, not to inf"),
    ],
)
def test_steps_that_cannot_be_meant_are_refused_before_anything_is_measured(journal, steps, said):
    evaluator = made_up()
    with pytest.raises(InputError, match=f"^{said}$"):
        prune_in_rounds(RecordedEvaluator(evaluator, journal), steps)
    assert evaluator.measured == []


def test_steps_that_add_up_to_everything_are_fine():
    check_steps([1 / 3] * 3)
    check_steps([0.1] * 10)
    check_steps([1])


def test_a_step_that_is_more_than_is_left_is_refused(journal):
    evaluator = made_up()
    with pytest.raises(InputError, match=r"^step: 0\.6 cannot be added; 0\.5 of the weights are left$"):
        probe_round(RecordedEvaluator(evaluator, journal), {"robust": 1.0}, 0.6)
    assert evaluator.measured == []


@pytest.mark.parametrize("sparsity", [-0.1, 1.01, math.nan, "half"])
def test_a_current_sparsity_that_is_none_is_refused(journal, sparsity):
    evaluator = made_up()
    with pytest.raises(TreatmentError, match=r"^robust: Prune: sparsity must"):
        probe_round(RecordedEvaluator(evaluator, journal), {"robust": sparsity}, 0.1)
    assert evaluator.measured == []


def test_an_unknown_component_is_refused(journal, llama_evaluator):
    with pytest.raises(ComponentError, match=r"no component 'model\.layers\.7\.mlp\.up_proj'"):
        probe_round(RecordedEvaluator(llama_evaluator, journal), {"model.layers.7.mlp.up_proj": 0.5}, 0.1)
    assert len(journal) == 0


def test_a_uniform_sparsity_out_of_range_is_refused():
    with pytest.raises(TreatmentError, match="Prune: sparsity must lie in"):
        uniform(made_up().decoder, 1.5)


# --------------------------------------------------------------------------------------------- tiny models


def test_the_fast_evaluator_from_rebased_states_and_the_reference_make_the_same_plan(
    tmp_path, llama, make_probes, monkeypatch
):
    if not has_arithmetic(Arithmetic.FLOAT32):
        pytest.skip("the instruction set in use has no kernel for fused layers")
    probes = make_probes(llama, 6)
    bases = []
    rebased = dtm.Evaluator.rebased
    monkeypatch.setattr(
        dtm.Evaluator,
        "rebased",
        lambda self, configuration, **options: (
            bases.append(configuration) or rebased(self, configuration, **options)
        ),
    )
    plans, rows = [], []
    for evaluator in (dtm.Evaluator(llama, probes, layers="fused"), dtm.ReferenceEvaluator(llama, probes)):
        journal = Journal.open(tmp_path / f"{type(evaluator).__name__}.sqlite", {})
        plans.append(prune_in_rounds(RecordedEvaluator(evaluator, journal), (0.2, 0.15, 0.1)))
        rows.append({json.dumps(row["configuration"]): row["fdt"] for row in journal})
        journal.close()
    fast, reference = plans
    assert rows[0] == rows[1]
    assert fast.configuration == reference.configuration
    assert fast.how == reference.how
    for ours, other in zip(fast.curve, reference.curve, strict=True):
        assert (ours.bits, ours.fdt75, ours.fdt, ours.sdt) == (other.bits, other.fdt75, other.fdt, other.sdt)
        assert ours.dppl == pytest.approx(other.dppl, rel=1e-4)
    sparsities = [each["sparsities"] for each in fast.how["rounds"][:-1]]
    assert [{path: each.sparsity for path, each in base.items()} for base in bases] == [
        {path: sparsity for path, sparsity in each.items() if sparsity} for each in sparsities
    ]


PROGRAM = """
import json, pathlib, sys
import dtm_fast as dtm, tiny
from dtm_fast.plan import RecordedEvaluator
from dtm_fast.plan.pruning_rounds import prune_in_rounds
from dtm_fast.runs import Journal

model = tiny.model_of("llama", num_hidden_layers=4)
probes = dtm.Probes.from_text(model, tiny.tokenizer_of_characters(), tiny.text_of(400), 12, 12, 16, cache=False)
for folder in map(pathlib.Path, sys.argv[1:]):
    folder.mkdir(exist_ok=True)
    journal = Journal.open(folder / "journal.sqlite", {})
    plan = prune_in_rounds(RecordedEvaluator(dtm.ReferenceEvaluator(model, probes), journal), (0.2, 0.15))
    (folder / "plan.json").write_text(json.dumps(plan.to_json()))
"""
PER_ROUND = 4 * 7 * 3


def started(*folders: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *map(str, folders)],
        cwd=Path(__file__).parents[1],
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.long
@pytest.mark.process
def test_a_plan_killed_in_its_second_round_ends_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # of the processes: more would only wait for each other
    once, killed = tmp_path / "once", tmp_path / "killed"
    with started(killed) as process:
        while len(finished(killed)) < PER_ROUND + 30:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not (killed / "plan.json").exists(), "it was finished before it could be killed"
    known = finished(killed)
    with started(killed, once) as process:
        _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert finished(killed)[: len(known)] == known  # each as it was, none measured again
    assert (killed / "plan.json").read_bytes() == (once / "plan.json").read_bytes()
    rows_of_both = [[row[:2] for row in finished(folder)] for folder in (killed, once)]
    assert rows_of_both[0] == rows_of_both[1]
    assert len(set(rows_of_both[0])) == len(rows_of_both[0]) == 1 + 2 * (PER_ROUND + 1)


def test_the_largest_remainders_get_what_rounding_down_loses():
    most = dict.fromkeys("abc", 9)
    assert _whole({"a": 1.2, "b": 1.8, "c": 2.0}, most, 5) == {"a": 1, "b": 2, "c": 2}
    assert _whole({"a": 1.6, "b": 1.8, "c": 1.6}, most, 5) == {"a": 2, "b": 2, "c": 1}
    assert _whole({"a": 1.2, "b": 1.8}, {"a": 9, "b": 1}, 3) == {"a": 2, "b": 1}
