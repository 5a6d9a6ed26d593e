"""The joint search and the comparison of criteria, on models whose harms are known."""

import itertools
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import tiny
import torch

import dtm_fast as dtm
from dtm_fast import Int8, Prune
from dtm_fast.compression import configuration_identity, effective_bits, shapes_of
from dtm_fast.errors import InputError
from dtm_fast.measure import Measurement
from dtm_fast.measure.racing import fdt75
from dtm_fast.plan import RecordedEvaluator
from dtm_fast.plan.comparison import chosen_by, compare
from dtm_fast.plan.harms import shrunk
from dtm_fast.plan.joint import FINALISTS, joint_measurements, joint_search, reached_by
from dtm_fast.plan.options import Options
from dtm_fast.plan.plan import Plan, Point
from dtm_fast.plan.units import units
from dtm_fast.runs import Journal

N, PROBES = 100, 8
TREATMENTS = (Int8(), Prune(0.5), Prune(0.75))


class MadeProbes(NamedTuple):
    identity: str
    count: int

    def __len__(self) -> int:
        return self.count


class FirstCause:
    """Every treated component diverges at some token of each probe; together they diverge where the first does.

    Models of one seed are one model; ``probes`` names those that it is measured on, ``count`` of them.
    """

    def __init__(
        self,
        components: int,
        seed: int = 0,
        fails_at: int | None = None,
        *,
        probes: str = "choosing",
        count: int = PROBES,
    ) -> None:
        draw, draw_other = random.Random(seed), random.Random(f"{seed} {probes}")
        shapes = {f"c{i}": (8, draw.choice([16, 32, 64])) for i in range(components)}
        self.decoder = SimpleNamespace(
            calibration="",
            components={path: SimpleNamespace(shape=s, numel=s[0] * s[1]) for path, s in shapes.items()},
        )
        self.decoder.component = self.decoder.components.__getitem__
        self.probes = MadeProbes(probes, count)
        self.measured: list[tuple[str, tuple[str, ...]]] = []
        self._fails_at = fails_at
        self._places = {}
        for path in shapes:
            # More sparsity harms more, int8 least; how much depends on the component.
            hurt = draw.choice([0.1, 1.0, 5.0])
            for each, scale in zip(TREATMENTS, (0.002, 0.01, 0.05), strict=True):
                places = [draw.expovariate(scale * hurt) for _ in range(PROBES)]
                if probes != "choosing":
                    places = [draw_other.expovariate(scale * hurt) for _ in range(count)]
                self._places[path, each.key] = places

    def iterate(self, configurations, metrics=()):
        for configuration in configurations:
            if len(self.measured) == self._fails_at:
                raise KeyboardInterrupt
            self.measured.append((configuration_identity(configuration), tuple(metrics)))
            yield self.of(configuration)

    def of(self, configuration) -> Measurement:
        count = len(self.probes)
        places = [self._places[path, each.key] for path, each in configuration.items()]
        fdt = [min([N, *(int(row[probe]) for row in places)]) for probe in range(count)]
        sdt = [len({int(row[probe]) for row in places if row[probe] < N}) for probe in range(count)]
        return Measurement(
            configuration=configuration,
            completion=N,
            fdt=torch.tensor(fdt),
            sdt=torch.tensor(sdt),
            first_margin=torch.full((count,), 0.5),
            dppl=torch.tensor([2.0 ** (each / N) for each in sdt], dtype=torch.float64),
        )

    def within(self, budget: float) -> list[tuple[float, float]]:
        """(FDT_75, mean FDT) of every configuration of at most so many bits, the best first."""
        paths, shapes, found = list(self.decoder.components), shapes_of(self.decoder), []
        for choices in itertools.product([None, *TREATMENTS], repeat=len(paths)):
            configuration = {path: each for path, each in zip(paths, choices, strict=True) if each}
            if effective_bits(shapes, configuration) <= budget:
                fdt = self.of(configuration).fdt
                found.append((fdt75(fdt), float(fdt.double().mean())))
        return sorted(found, reverse=True)


def recorded(evaluator, folder: Path) -> RecordedEvaluator:
    return RecordedEvaluator(evaluator, Journal.open(folder / "journal.sqlite", {"model": "made"}))


def search(evaluator, folder: Path, budgets=(8.0, 6.0), treatments=TREATMENTS, **options) -> Plan:
    run = recorded(evaluator, folder)
    return joint_search(
        run, treatments, [(path,) for path in evaluator.decoder.components], budgets, **options
    )


@pytest.mark.parametrize("seed", range(5))
def test_it_fits_its_budgets_and_comes_near_the_optimum(tmp_path, seed):
    evaluator = FirstCause(5, seed)
    plan = search(evaluator, tmp_path, (10.0, 7.0, 5.0))
    shapes = shapes_of(evaluator.decoder)
    assert effective_bits(shapes, plan.configuration) <= 10
    for budget, point in reached_by(plan).items():
        every = evaluator.within(budget)
        assert point.bits <= budget
        assert every.index((point.fdt75, point.fdt)) <= 0.02 * len(every)
    assert plan.chosen == reached_by(plan)[10.0]
    assert plan.search == "joint"


class Feud(FirstCause):
    """Kinds of treatments that do well alone and diverge at once beside each other, as no sum of harms says."""

    def of(self, configuration) -> Measurement:
        found = super().of(configuration)
        if len({type(each) for each in configuration.values()}) > 1:
            found = replace(found, fdt=torch.zeros(PROBES, dtype=torch.int64))
        return found


@pytest.mark.parametrize("refinements", [0, 2])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind_of_model", [Feud, FirstCause])
def test_it_is_no_worse_than_any_kind_of_treatment_alone(tmp_path, kind_of_model, seed, refinements):
    evaluator = kind_of_model(6, seed)
    found = search(evaluator, tmp_path, (12.0,), refinements=refinements).chosen
    for kind in (TREATMENTS[:1], TREATMENTS[1:]):
        alone = search(evaluator, tmp_path, (12.0,), kind, refinements=refinements).chosen
        assert (found.fdt75, found.fdt) >= (alone.fdt75, alone.fdt)
    assert found.fdt > 0


def confirmed(folder: Path, seed: int, treatments=TREATMENTS) -> Plan:
    """A search on eight probes that others confirm."""
    folder.mkdir(exist_ok=True)
    other = FirstCause(8, seed, probes="confirming", count=40)
    run = RecordedEvaluator(other, Journal.open(folder / "confirming.sqlite", {"model": "made"}))
    return search(FirstCause(8, seed), folder, (12.0, 10.0), treatments, confirming=run)


@pytest.mark.parametrize("seed", range(3))
def test_what_other_probes_confirm_is_no_worse_on_them_than_any_kind_alone(tmp_path, seed):
    plan = confirmed(tmp_path / "all", seed)
    other = FirstCause(8, seed, probes="confirming", count=40)
    measured = other.of(plan.configuration)
    assert plan.chosen == Point.of(other.decoder, measured)
    assert plan.how["confirmed_on"] == 40
    assert all(point.bits <= budget for budget, point in reached_by(plan).items())
    for place, kind in enumerate((TREATMENTS[:1], TREATMENTS[1:])):
        alone = confirmed(tmp_path / str(place), seed, kind)
        for budget, point in reached_by(alone).items():
            ours = reached_by(plan)[budget]
            assert (ours.fdt75, ours.fdt) >= (point.fdt75, point.fdt)
    assert confirmed(tmp_path / "all", seed) == plan


def test_what_is_confirmed_is_better_on_probes_that_nobody_has_seen(tmp_path):
    """Of searches on eight probes: those are few enough that the best on them is mostly lucky."""
    gains = []
    for seed in range(8):
        judge = FirstCause(8, seed, probes="judging", count=400)
        with_others = confirmed(tmp_path / f"{seed}", seed)
        without = search(FirstCause(8, seed), tmp_path / f"{seed}", (12.0, 10.0))
        pair = [judge.of(plan.configuration).fdt.double().mean() for plan in (with_others, without)]
        gains.append(float(pair[0] - pair[1]))
    assert sum(gains) / len(gains) > 1
    assert min(gains) > -1


def test_only_finalists_are_measured_where_it_is_confirmed(tmp_path):
    other = FirstCause(8, probes="confirming", count=40)
    run = RecordedEvaluator(other, Journal.open(tmp_path / "confirming.sqlite", {"model": "made"}))
    evaluator = FirstCause(8)
    search(evaluator, tmp_path, (9.0,), confirming=run, refinements=3)
    assert 0 < len(other.measured) <= 3 * FINALISTS < len(evaluator.measured)


def test_a_search_broken_off_while_it_is_confirmed_ends_in_the_same_plan(tmp_path):
    expected = confirmed(tmp_path / "whole", 1)
    folder = tmp_path / "broken"
    folder.mkdir()
    journal = Journal.open(folder / "confirming.sqlite", {"model": "made"})
    broken = FirstCause(8, 1, fails_at=3, probes="confirming", count=40)
    with pytest.raises(KeyboardInterrupt):
        search(FirstCause(8, 1), folder, (12.0, 10.0), confirming=RecordedEvaluator(broken, journal))
    again, other = FirstCause(8, 1), FirstCause(8, 1, probes="confirming", count=40)
    assert search(again, folder, (12.0, 10.0), confirming=RecordedEvaluator(other, journal)) == expected
    assert again.measured == []
    assert not set(broken.measured) & set(other.measured)


def test_what_cannot_confirm_is_refused_before_anything_is_measured(tmp_path):
    evaluator = FirstCause(4)
    with pytest.raises(InputError, match="confirming: its probes are those that choose"):
        search(evaluator, tmp_path, confirming=recorded(FirstCause(4), tmp_path))
    other = RecordedEvaluator(
        FirstCause(4, probes="confirming"), Journal.open(tmp_path / "other.sqlite", {"model": "else"})
    )
    with pytest.raises(InputError, match="confirming: it measures another model"):
        search(evaluator, tmp_path, confirming=other)
    calibrated = FirstCause(4, probes="confirming")
    calibrated.decoder.calibration = "of another text"
    (tmp_path / "calibrated").mkdir()
    with pytest.raises(InputError, match="confirming: it measures with another calibration"):
        search(evaluator, tmp_path, confirming=recorded(calibrated, tmp_path / "calibrated"))
    assert evaluator.measured == []


def test_counted_harms_are_drawn_towards_their_treatments_by_hand():
    assert shrunk([(0, 100.0), (2, 100.0)]) == pytest.approx([1 / 200, 3 / 200])
    assert shrunk([(0, 50.0), (0, 100.0)]) == [0.0, 0.0]
    # With much to go by, hardly.
    assert shrunk([(1000, 1e5), (3000, 1e5)]) == pytest.approx([0.01, 0.03], rel=1e-2)


def test_refining_never_makes_it_worse_and_sometimes_better(tmp_path):
    better = 0
    for seed in range(4):
        folders = [tmp_path / f"{seed}-{times}" for times in (0, 1, 2)]
        for folder in folders:
            folder.mkdir()
        found = [
            search(FirstCause(10, seed), folder, (6.0,), refinements=times).chosen
            for times, folder in enumerate(folders)
        ]
        pairs = [(point.fdt75, point.fdt) for point in found]
        assert pairs == sorted(pairs)
        better += pairs[-1] > pairs[0]
    assert better


def test_more_treatments_are_never_worse_in_one_journal(tmp_path):
    """Not a property of the search but of its result: what is joint may be what one treatment alone gives."""
    evaluator = FirstCause(10, 3)
    alone = [search(evaluator, tmp_path, (10.0,), [each]).chosen for each in TREATMENTS]
    joint = search(evaluator, tmp_path, (10.0,)).chosen
    assert all((joint.fdt75, joint.fdt) >= (point.fdt75, point.fdt) for point in alone)


def test_nothing_is_measured_twice_and_a_broken_off_search_ends_in_the_same_plan(tmp_path):
    (tmp_path / "whole").mkdir()
    whole = FirstCause(7, 1)
    expected = search(whole, tmp_path / "whole")
    assert len(whole.measured) == len(set(whole.measured))
    for fails_at in (0, 1, 10, 25, len(whole.measured) - 1):
        folder = tmp_path / str(fails_at)
        folder.mkdir()
        broken = FirstCause(7, 1, fails_at)
        with pytest.raises(KeyboardInterrupt):
            search(broken, folder)
        again = FirstCause(7, 1)
        assert search(again, folder) == expected
        assert sorted(broken.measured + again.measured) == sorted(whole.measured)


def test_the_curve_is_a_front(tmp_path):
    curve = search(FirstCause(8, 2), tmp_path, (12.0, 9.0, 7.0, 5.0)).curve
    assert [(p.bits, p.fdt) for p in curve] == sorted((p.bits, p.fdt) for p in curve)
    assert len({p.fdt for p in curve}) == len(curve)


def test_json_and_back(tmp_path):
    plan = search(FirstCause(4), tmp_path)
    assert Plan.from_json(plan.to_json()) == plan
    assert reached_by(Plan.from_json(plan.to_json())) == reached_by(plan)


@pytest.mark.parametrize(
    ("treatments", "budgets", "refinements"), [(TREATMENTS, (8.0, 6.0), 1), (TREATMENTS[:1], (9.0, 12.0), 2)]
)
def test_how_many_measurements_are_expected(tmp_path, treatments, budgets, refinements):
    evaluator, asked = FirstCause(5), []
    journal = Journal.open(tmp_path / "journal.sqlite", {"model": "made"})
    run = RecordedEvaluator(evaluator, journal, lambda measurement, known: asked.append(known))
    units = [(path,) for path in evaluator.decoder.components]
    joint_search(run, treatments, units, budgets, refinements=refinements)
    options = Options(evaluator.decoder, treatments, units)
    most = joint_measurements(evaluator.decoder, options, budgets, refinements, confirmed=False)
    assert 0.6 * most < len(asked) <= most
    more = joint_measurements(evaluator.decoder, options, budgets, refinements, confirmed=True) - most
    # Of all treatments together every budget is reached, of one kind alone perhaps not.
    assert more in {
        FINALISTS * searches * len(budgets) for searches in range(1, 4 if len(treatments) > 1 else 2)
    }


def test_a_roomy_budget_keeps_everything(tmp_path):
    plan = search(FirstCause(4), tmp_path, (16.0,))
    assert (plan.configuration, plan.chosen) == ({}, None)


def test_bad_input_is_refused_before_anything_is_measured(tmp_path):
    evaluator = FirstCause(4)
    with pytest.raises(InputError, match=r"budget: 2 effective bits cannot be reached; the smallest .* is 5"):
        search(evaluator, tmp_path, (8.0, 2.0))
    with pytest.raises(InputError, match="budgets: at least one"):
        search(evaluator, tmp_path, ())
    with pytest.raises(InputError, match="treatments: at least one"):
        search(evaluator, tmp_path, treatments=())
    with pytest.raises(InputError, match="no harm 'bleu'; known: fdt, sdt, dppl, perplexity, kl, layer"):
        chosen_by(recorded(evaluator, tmp_path), TREATMENTS, [("c0",)], [8.0], "bleu")
    assert evaluator.measured == []


def test_what_each_criterion_chooses_is_the_least_harmful_by_it(tmp_path):
    evaluator = FirstCause(8, 5)
    run = recorded(evaluator, tmp_path)
    names = [(path,) for path in evaluator.decoder.components]
    (chosen,) = chosen_by(run, [Int8()], names, [12.0], "sdt")
    alone = {path: float(evaluator.of({path: Int8()}).sdt.sum()) for (path,) in names}
    shapes = shapes_of(evaluator.decoder)
    assert effective_bits(shapes, chosen) <= 12
    saved = {path: 8 * n * k - 32 * n for path, (n, k) in shapes.items()}
    worst = max(alone[path] / saved[path] for path in chosen)
    left = [path for (path,) in names if path not in chosen and alone[path] / saved[path] < worst]
    assert all(saved[path] < max(saved.values()) for path in left), (
        "only what fits the rest of the budget is left"
    )


def test_criteria_on_a_model(make_probes, tmp_path):
    """Measured ones and predicted ones, each within the budget; the calibration is of the probes' own tokens."""
    model = tiny.model_of("llama")
    probes = make_probes(model)
    calibration = dtm.Calibration.collect(model, probes.tokens)
    evaluator = dtm.Evaluator(model, probes, calibration=calibration)
    run = recorded(evaluator, tmp_path)
    found = compare(run, [Int8(), Prune(0.5)], units(evaluator.decoder, fused=True), [9.0, 12.0])
    assert list(found) == ["fdt", "sdt", "dppl", "perplexity", "kl", "layer error", "gradient"]
    for measured in found.values():
        for budget, measurement in zip((9.0, 12.0), measured, strict=True):
            assert Point.of(evaluator.decoder, measurement).bits <= budget
            assert measurement.kl is not None
            kinds = {}
            for path, treatment in measurement.configuration.items():
                if path.endswith(("q_proj", "k_proj", "v_proj")):
                    kinds.setdefault(path.rpartition(".")[0], []).append(treatment.key)
            assert all(len(set(each)) == 1 and len(each) == 3 for each in kinds.values())
