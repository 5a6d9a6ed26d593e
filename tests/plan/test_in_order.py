import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up import MadeUpEvaluator, N, int8

from dtm_fast import Int8, Prune
from dtm_fast.errors import InputError
from dtm_fast.plan import Plan, RecordedEvaluator, Stop, metrics_for, plan_in_order, sweep
from dtm_fast.runs import Journal

PATHS = [f"c{i:02}" for i in range(20)]


ALL = Stop()


class Setting:
    """Twenty components; alone c00 harms least; k of them together have FDT ``joint(k)``."""

    def __init__(self, journal, joint=lambda k: N - k // 3, sizes=None) -> None:
        def fdt_of(configuration):
            (*_, last) = configuration
            return N - PATHS.index(last) // 2 if len(configuration) == 1 else joint(len(configuration))

        self.evaluator = MadeUpEvaluator(fdt_of, sizes or dict.fromkeys(reversed(PATHS), 5))
        self.recorded = RecordedEvaluator(self.evaluator, journal)

    def plan(self, stop=ALL, every=5, by="fdt75") -> Plan:
        return plan_in_order(self.recorded, Int8(), by, stop, every)

    def joint_sizes(self) -> list[int]:
        return [len(c) for c in self.evaluator.measured[len(PATHS) :]]


@pytest.fixture
def journal(tmp_path):
    opened = Journal.open(tmp_path / "journal.sqlite", {})
    yield opened
    opened.close()


@pytest.fixture
def setting(journal) -> Setting:
    return Setting(journal)


def test_a_sweep_measures_every_component_alone_in_depth_order(setting):
    measured = sweep(setting.recorded, Prune(0.5))
    assert list(measured) == list(reversed(PATHS))
    assert setting.evaluator.measured == [{path: Prune(0.5)} for path in reversed(PATHS)]


def test_without_a_stop_everything_is_converted_in_order_of_harm(setting):
    plan = setting.plan()
    assert plan.how["order"] == PATHS
    assert plan.configuration == int8(*PATHS)
    assert list(plan.configuration) == PATHS


def test_the_curve_has_a_point_at_every_so_many_and_at_the_end(setting):
    plan = setting.plan(every=6)
    assert [(p.components, p.fdt75, p.fdt, p.sdt) for p in plan.curve] == [
        (k, N - k // 3, N - k // 3, k // 3) for k in (6, 12, 18, 20)
    ]
    assert [p.share for p in plan.curve] == [0.3, 0.6, 0.9, 1.0]
    assert plan.chosen == plan.curve[-1]
    assert setting.joint_sizes() == [6, 12, 18, 20]


def test_a_step_that_ends_at_the_stop_measures_it_once(setting):
    setting.plan(Stop(components=10), every=5)
    assert setting.joint_sizes() == [5, 10]


@pytest.mark.parametrize(("components", "expected"), [(1, 1), (7, 7), (20, 20), (99, 20)])
def test_never_more_components_than_asked_for(setting, components, expected):
    plan = setting.plan(Stop(components=components))
    assert len(plan.configuration) == plan.chosen.components == expected
    assert max([0, *setting.joint_sizes()]) <= expected


@pytest.mark.parametrize(("share", "expected"), [(0.05, 1), (0.32, 6), (0.35, 7), (0.999, 19), (1.0, 20)])
def test_never_more_of_the_parameters_than_asked_for(setting, share, expected):
    plan = setting.plan(Stop(share=share))
    assert len(plan.configuration) == expected
    assert plan.chosen.share <= share


def test_the_share_counts_parameters_not_components(journal):
    sizes = {path: 81 if path == "c01" else 1 for path in PATHS}
    plan = Setting(journal, sizes=sizes).plan(Stop(share=0.5))
    assert list(plan.configuration) == ["c00"]
    assert plan.chosen.share == 0.01


def test_a_share_smaller_than_any_component_gives_an_empty_plan(setting):
    plan = setting.plan(Stop(share=0.04))
    assert (plan.configuration, plan.curve, plan.chosen) == ({}, [], None)
    assert len(plan.how["order"]) == 20


@settings(max_examples=60, deadline=None)
@given(lost=st.integers(1, 25), every=st.integers(1, 25), floor=st.integers(1, N))
def test_min_fdt_is_kept_by_the_largest_size_that_keeps_it(tmp_path_factory, lost, every, floor):
    def joint(k):  # falls by one every `lost` components
        return max(0, N - k // lost)

    opened = Journal.open(tmp_path_factory.mktemp("run") / "journal.sqlite", {})
    # Alone a component has FDT N - index // 2, so keep the two consistent at size 1.
    setting = Setting(opened, joint)
    plan = setting.plan(Stop(min_fdt=floor), every)
    opened.close()
    keeps = [k for k in range(1, 21) if (joint(k) if k > 1 else N) >= floor]
    largest = max(keeps, default=0)
    assert len(plan.configuration) == largest
    assert len(set(map(len, setting.evaluator.measured))) - 1 <= 20 // every + 1 + 5  # and bisection is short


def test_bisection_measures_only_between_the_last_good_and_the_first_bad_step(journal):
    setting = Setting(journal, lambda k: N if k <= 12 else 0)
    plan = setting.plan(Stop(min_fdt=8), every=8)
    assert setting.joint_sizes() == [8, 16, 12, 14, 13]
    assert [p.components for p in plan.curve] == [8, 12, 13, 14, 16]
    assert plan.chosen.components == 12


def test_a_min_fdt_that_nothing_keeps_gives_an_empty_plan(journal):
    setting = Setting(journal, lambda k: 0)
    setting.evaluator.fdt_of = lambda configuration: 0
    plan = setting.plan(Stop(min_fdt=1))
    assert (plan.configuration, plan.chosen) == ({}, None)
    assert [p.components for p in plan.curve] == [1, 2, 5]


def test_all_stops_together_end_at_the_first(setting):
    assert len(setting.plan(Stop(components=12, share=0.5, min_fdt=8)).configuration) == 8
    assert len(setting.plan(Stop(components=12, share=0.25, min_fdt=8)).configuration) == 5
    assert len(setting.plan(Stop(components=3, share=0.25, min_fdt=8)).configuration) == 3


def test_planned_again_nothing_is_measured_and_the_plan_is_the_same(setting):
    first = setting.plan(Stop(min_fdt=7))
    measured = len(setting.evaluator.measured)
    assert setting.plan(Stop(min_fdt=7)).to_json() == first.to_json()
    assert len(setting.evaluator.measured) == measured


def test_a_plan_interrupted_anywhere_ends_the_same(tmp_path):
    def joint(k):
        return N - k // 3

    whole = Journal.open(tmp_path / "whole.sqlite", {})
    setting = Setting(whole, joint)
    expected = setting.plan(Stop(min_fdt=7)).to_json()
    total = len(setting.evaluator.measured)
    whole.close()
    part = Journal.open(tmp_path / "part.sqlite", {})
    measured = 0
    for fails_at in range(total):
        setting = Setting(part, joint)
        setting.evaluator.fails_at = 1 if fails_at < total - 1 else None
        try:
            found = setting.plan(Stop(min_fdt=7)).to_json()
        except KeyboardInterrupt:
            found = None
        measured += len(setting.evaluator.measured)
    part.close()
    assert found == expected
    assert measured == total


def test_by_dppl_the_order_is_that_of_dppl(setting):
    plan = setting.plan(Stop(components=2), by="dppl")
    assert (plan.how["ranked_by"], list(plan.configuration)) == ("dppl", ["c00", "c01"])
    assert plan.chosen.dppl == 1.0 + N - plan.chosen.fdt


def test_json_and_back(setting):
    for stop in (Stop(), Stop(components=7, share=0.9, min_fdt=3), Stop(share=0.01)):
        plan = setting.plan(stop)
        assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": 99}, "plan: format 99, this dtm_fast reads 2"),
        ({"configuration": ["a"]}, "its configuration holds no names and values"),
        ({"configuration": {"a": "what"}}, "no treatment 'what'"),
        ({"configuration": {"a": 5}}, "a treatment of its configuration is no text"),
        ({"search": 3}, "its search, model or calibration is no text"),
        ({"how": 1}, "its how holds no names and values"),
        ({"curve": [{}]}, "a point has bits, components, dppl, .*; not {}"),
        ({"curve": 3}, "its curve holds no list"),
        ({"chosen": [1]}, r"a point has bits, components, dppl, .*; not \[1\]"),
        ({"model": None}, "its search, model or calibration is no text"),
    ],
    ids=str,
)
def test_what_is_no_plan_is_refused(setting, change, said):
    with pytest.raises(InputError, match=said):
        Plan.from_json(setting.plan().to_json() | change)


@pytest.mark.parametrize(
    ("stored", "said"),
    [
        ({}, "its format is missing"),
        ([], "it holds no names and values"),
        (None, "it holds no names and values"),
        ("plan", "it holds no names and values"),
    ],
    ids=str,
)
def test_what_is_no_plan_at_all_is_refused(stored, said):
    with pytest.raises(InputError, match=f"^plan: {said}$"):
        Plan.from_json(stored)


@pytest.mark.parametrize(
    "stop",
    [
        Stop(components=0),
        Stop(components=-1),
        Stop(share=0),
        Stop(share=-0.5),
        Stop(share=1.01),
        Stop(share=float("nan")),
        Stop(min_fdt=-1),
        Stop(min_fdt=101),
        Stop(min_fdt=float("nan")),
    ],
    ids=str,
)
def test_a_stop_that_cannot_be_meant_is_refused(stop):
    with pytest.raises(InputError, match=r"^stop: "):
        stop.check(100)


@pytest.mark.parametrize("stop", [Stop(), Stop(components=1, share=1, min_fdt=0), Stop(min_fdt=100)], ids=str)
def test_other_stops_are_fine(stop):
    stop.check(100)


@pytest.mark.parametrize("every", [0, -3])
def test_every_is_at_least_one_and_is_refused_before_anything_is_measured(setting, every):
    with pytest.raises(
        InputError, match=f"every: at least 1 component between two measurements, not {every}"
    ):
        setting.plan(every=every)
    assert setting.evaluator.measured == []


def test_a_stop_is_refused_before_anything_is_measured(setting):
    for stop in (Stop(components=-3), Stop(share=5.0), Stop(min_fdt=1e9)):
        with pytest.raises(InputError, match=r"^stop: "):
            setting.plan(stop=stop)
    assert setting.evaluator.measured == []


def test_an_unknown_ranking_is_refused_before_anything_is_measured(setting):
    with pytest.raises(InputError, match="no ranking 'bleu'; known: fdt75, dppl, perplexity"):
        setting.plan(by="bleu")
    assert setting.evaluator.measured == []


def test_ranking_by_perplexity_needs_two_tokens():
    with pytest.raises(InputError, match="ranking by perplexity needs prefixes of at least 2 tokens"):
        metrics_for("perplexity", 1)
    assert metrics_for("perplexity", 2) == ["dppl", "perplexity", "sdt"]
