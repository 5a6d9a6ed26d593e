"""A search goes on where some configurations have no finite logits, and chooses others."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import dtm_fast as dtm
from dtm_fast.compression import Prune
from dtm_fast.errors import NotFiniteError
from dtm_fast.measure import EXTRA_METRICS
from dtm_fast.plan import RecordedEvaluator, beam_search, joint_search, plan_in_order, prune_in_rounds, units
from dtm_fast.plan.comparison import compare
from dtm_fast.plan.in_order import Stop, sweep
from dtm_fast.runs import Journal

LOST = ("model.layers.0.self_attn.v_proj", "model.layers.1.mlp.up_proj")


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    opened = Journal.open(tmp_path / "journal.sqlite", {"model": "m"})
    yield opened
    opened.close()


@pytest.fixture(params=[dtm.Evaluator, dtm.ReferenceEvaluator])
def evaluator(request, llama, make_probes, monkeypatch):
    """Of a model of which two components, once they are changed by more than 5%, leave nothing that is a number."""
    made = request.param(llama, make_probes(llama))
    ruined = [llama.get_submodule(path).weight for path in LOST]
    for kind in (dtm.Int8, Prune):
        plain = kind.compress

        def compress(self, weight, inputs=None, plain=plain):
            found = plain(self, weight, inputs)
            is_one = any(torch.equal(weight, each) for each in ruined)
            changed = float((found != weight).float().mean())
            return found * torch.nan if is_one and changed > 0.05 else found

        monkeypatch.setattr(kind, "compress", compress)
    return made


def test_they_are_worth_nothing_and_everyone_else_is_measured(evaluator, journal):
    said = []
    recorded = RecordedEvaluator(evaluator, journal, lambda measurement, known: said.append(known))
    found = sweep(recorded, dtm.Int8(), ["dppl", "agreement"])
    assert [path for path in found if not found[path].finite] == list(LOST)
    for path in LOST:
        lost = found[path]
        assert (lost.configuration, lost.completion) == ({path: dtm.Int8()}, 12)
        assert (lost.fdt.tolist(), lost.sdt.tolist()) == ([0] * 4, [12] * 4)
        assert (lost.dppl.tolist(), lost.agreement.tolist()) == ([torch.inf] * 4, [0.0] * 4)
        assert (lost.kl, lost.first_margin.isnan().all()) == (None, True)
    assert len(said) == len(journal) == len(found) == 21
    again = sweep(RecordedEvaluator(evaluator, journal, lambda m, known: said.append(known)), dtm.Int8())
    assert {path: m.to_json() for path, m in again.items()} == {p: m.to_json() for p, m in found.items()}
    assert said == [False] * 21 + [True] * 21


def test_the_bases_own_failure_ends_a_search(evaluator, journal):
    with torch.no_grad():
        evaluator.model.model.norm.weight.fill_(torch.nan)
    other = type(evaluator)
    with pytest.raises(NotFiniteError):
        RecordedEvaluator(other(evaluator.model, evaluator.probes), journal).measure([{}], ["kl"])
    assert len(journal) == 0


def test_no_search_chooses_them(evaluator, journal):
    recorded, kinds = RecordedEvaluator(evaluator, journal), units(evaluator.decoder, False)
    plans = [plan_in_order(recorded, dtm.Int8(), by, Stop(components=19)) for by in ("fdt75", "dppl", "kl")]
    plans += [beam_search(recorded, [dtm.Int8()], 3, width=2, by=by, units=kinds) for by in ("fdt75", "kl")]
    plans.append(joint_search(recorded, [dtm.Int8(), Prune(0.5)], kinds, [11.0], refinements=1))
    rounds = prune_in_rounds(recorded, [0.2, 0.1])
    for plan in [*plans, rounds]:
        assert plan.chosen is not None
        assert plan.chosen.dppl is not None
        json.dumps(plan.to_json(), allow_nan=False)
    assert not any(set(plan.configuration) & {*LOST} for plan in plans)
    assert all(rounds.configuration[path].sparsity < 0.05 for path in LOST)
    for chosen in compare(recorded, [dtm.Int8()], kinds, [11.0], ["fdt", "dppl", "kl", "sdt"]).values():
        assert chosen[0].finite


@pytest.mark.parametrize("evaluator", [dtm.Evaluator], indirect=True)
def test_they_are_among_the_best_only_where_there_are_no_others(evaluator, journal):
    if not evaluator.can_race:
        pytest.skip("the instruction set in use has no kernel for fused layers")
    recorded = RecordedEvaluator(evaluator, journal)
    candidates = [{path: dtm.Int8()} for path in (*LOST, "model.layers.2.mlp.up_proj")]
    assert [m.finite for m in recorded.best(candidates, 1).best] == [True]
    assert [m.finite for m in recorded.best(candidates, 2).best] == [True, False]
    assert len(journal) == 3


def test_it_is_kept_as_json(evaluator):
    lost = dtm.Measurement.of_nothing({LOST[0]: dtm.Int8()}, 3, 7, list(EXTRA_METRICS))
    kept = dtm.Measurement.from_json(json.loads(json.dumps(lost.to_json(), allow_nan=False)))
    assert kept.to_json() == lost.to_json()
    assert not kept.finite
    assert {name: getattr(kept, name).tolist() for name in EXTRA_METRICS} == {
        "dppl": [torch.inf] * 3,
        "perplexity": [torch.inf] * 3,
        "agreement": [0.0] * 3,
        "kl": [torch.inf] * 3,
    }
    assert (kept.fdt.tolist(), kept.sdt.tolist()) == ([0] * 3, [7] * 3)
    assert dtm.Measurement.of_nothing({}, 3, 7, ()).sdt is None
