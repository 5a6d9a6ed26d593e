"""Plans of the searches themselves, on a tiny model: a report reads what they write."""

from pathlib import Path
from typing import Any

import pytest
from made_run import make_run
from page_text import figures_in

from dtm_fast.compression import Int8, Prune
from dtm_fast.plan import (
    RecordedEvaluator,
    beam_search,
    compare,
    joint_search,
    kept_by,
    plan_in_order,
    prune_in_rounds,
    units,
)
from dtm_fast.report.content import read_content
from dtm_fast.report.page import page
from dtm_fast.report.searches import Beam, InOrder, Joint, Rounds
from dtm_fast.runs import RunDirectory


@pytest.fixture
def run(tmp_path: Path, llama_evaluator: Any) -> RunDirectory:
    """A run of the evaluator's model, with nothing measured."""
    decoder, probes = llama_evaluator.decoder, llama_evaluator.probes
    listed = [
        {"path": c.path, "layer": c.layer, "name": c.name, "shape": list(c.shape)}
        for c in decoder.components.values()
    ]
    with make_run(tmp_path / "run", listed) as directory:
        stored = directory.read_json("run.json")
        assert stored is not None
        stored["probes"] |= {"count": len(probes), "prefix": probes.prefix, "completion": probes.completion}
        directory.write_json("run.json", stored)
        yield directory


def test_every_search_can_be_reported(run: RunDirectory, llama_evaluator: Any) -> None:
    recorded = RecordedEvaluator(llama_evaluator, run.journal)
    fused = units(llama_evaluator.decoder, fused=True)
    treatments = (Int8(), Prune(0.5))
    searches = {
        Rounds: lambda: prune_in_rounds(recorded, (0.3, 0.2)),
        Beam: lambda: beam_search(recorded, treatments, 2, width=2, units=fused, among=3),
        Joint: lambda: joint_search(recorded, treatments, fused, (9.0, 12.0)),
        InOrder: lambda: plan_in_order(recorded, Int8(), every=7),
    }
    for kind, search in searches.items():
        plan = search()
        run.write_json("plan.json", plan.to_json())
        content = read_content(run)
        assert isinstance(content.search, kind)
        assert content.plan == plan
        assert content.planned is not None
        assert plan.chosen is not None
        assert content.planned.summary("fdt").mean == plan.chosen.fdt
        if isinstance(content.search, Beam):
            assert content.planned.configuration == kept_by(plan)[-1][0]
        names = figures_in(page(content))
        assert names[:2] == ["plan-map", "curve-fdt" if kind is InOrder else "progress-fdt"]


def test_a_comparison_can_be_reported(run: RunDirectory, llama_evaluator: Any) -> None:
    recorded = RecordedEvaluator(llama_evaluator, run.journal)
    fused = units(llama_evaluator.decoder, fused=True)
    criteria, budgets = ("fdt", "kl", "gradient"), (9.0, 12.0)
    found = compare(recorded, (Int8(),), fused, budgets, criteria)
    rows = [
        {"by": by, "budget": budget, **measurement.to_json()}
        for by, measurements in found.items()
        for budget, measurement in zip(budgets, measurements, strict=True)
    ]
    run.write_json("comparison.json", {"treatments": ["int8"], "rows": rows})
    content = read_content(run)
    assert content.comparison is not None
    assert tuple(content.comparison.chosen) == criteria
    for choices in content.comparison.chosen.values():
        assert all(each.bits <= each.budget for each in choices)
    # Every unit was measured alone, for FDT and for KL.
    (sweep,) = content.sweeps
    assert (len(sweep.measured), len(sweep.ranked)) == (len(llama_evaluator.decoder.components), len(fused))
    assert "baselines" in figures_in(page(content))
