"""Beam searches on a tiny model: raced, from parents' states, and ended in their midst."""

import itertools
import json
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny

import dtm_fast as dtm
from dtm_fast.compression import name_of
from dtm_fast.ops.layer_weights import Arithmetic, has_arithmetic
from dtm_fast.plan import RecordedEvaluator
from dtm_fast.plan.beam import beam_search, kept_by
from dtm_fast.plan.units import units
from dtm_fast.runs import Journal

INT8, HALF = dtm.Int8(), dtm.Prune(0.5)

pytestmark = pytest.mark.skipif(
    not has_arithmetic(Arithmetic.FLOAT32), reason="the instruction set in use has no kernel for fused layers"
)


@pytest.fixture
def journal(tmp_path):
    opened = Journal.open(tmp_path / "journal.sqlite", {"model": "m"})
    yield opened
    opened.close()


@pytest.fixture
def probes(llama, make_probes):
    return make_probes(llama, 6)


@pytest.mark.parametrize(
    ("by", "fused"),
    [("fdt75", False), ("dppl", False), ("perplexity", False), ("kl", False), ("fdt75", True)],
)
def test_on_a_model_it_keeps_what_the_reference_keeps(llama, probes, tmp_path, by, fused):
    plans = []
    for name, evaluator in (
        ("ours", dtm.Evaluator(llama, probes, layers="fused")),
        ("reference", dtm.ReferenceEvaluator(llama, probes)),
    ):
        opened = Journal.open(tmp_path / f"{name}.sqlite", {})
        chosen = units(evaluator.decoder, fused)
        plans.append(
            beam_search(
                RecordedEvaluator(evaluator, opened),
                [dtm.Prune(0.35), HALF],
                3,
                width=3,
                by=by,
                units=chosen,
                among=5,
            )
        )
        opened.close()
    ours, reference = plans
    assert kept_by(ours) == kept_by(reference)
    assert ours.chosen.fdt < probes.completion  # otherwise equality would say little
    for one, other in zip(ours.curve, reference.curve, strict=True):
        assert (one.fdt75, one.fdt, one.sdt) == (other.fdt75, other.fdt, other.sdt)
        assert one.dppl == pytest.approx(other.dppl, rel=1e-5)


@pytest.fixture
def racer(llama, probes) -> dtm.Evaluator:
    return dtm.Evaluator(llama, probes, layers="fused")


def test_hopeless_extensions_are_not_read_to_their_end(racer, journal):
    plan = beam_search(RecordedEvaluator(racer, journal), [INT8, HALF], 3, width=3)
    extended = {
        name_of({**parent, path: treatment})
        for parents in ([{}], *kept_by(plan)[:2])
        for parent in parents
        for path in racer.decoder.components
        for treatment in (INT8, HALF)
        if path not in parent
    }
    measured = {name_of(dtm.Measurement.from_json(row).configuration) for row in journal}
    dropped = journal._connection.execute("SELECT count(*) FROM bounds").fetchone()[0]
    assert len(measured) + dropped == len(extended)
    assert dropped > len(measured)


def test_each_parents_states_take_the_place_of_those_before(racer, journal, monkeypatch):
    asked, rebased = [], RecordedEvaluator.rebased

    def counted(self, configuration, instead_of=None):
        found = rebased(self, configuration, instead_of)
        asked.append((configuration, instead_of, found))
        return found

    monkeypatch.setattr(RecordedEvaluator, "rebased", counted)
    recorded = RecordedEvaluator(racer, journal)
    plan = beam_search(recorded, [INT8], 3, width=2)
    assert [configuration for configuration, _, _ in asked] == [*kept_by(plan)[0], *kept_by(plan)[1]]
    assert asked[0][1] is None
    assert all(later[1] is earlier[2] is not recorded for earlier, later in itertools.pairwise(asked))


def test_where_other_states_cannot_be_had_it_races_without(racer, journal, tmp_path):
    """The fused layers do not know W8A8."""
    raced = beam_search(RecordedEvaluator(racer, journal), [dtm.W8A8(), HALF], 2, width=3, among=5)
    opened = Journal.open(tmp_path / "reference.sqlite", {"model": "m"})
    reference = RecordedEvaluator(dtm.ReferenceEvaluator(racer.model, racer.probes), opened)
    assert kept_by(raced) == kept_by(beam_search(reference, [dtm.W8A8(), HALF], 2, width=3, among=5))
    opened.close()


class EndedError(Exception):
    pass


@pytest.mark.parametrize("every", [1, 7])
def test_a_race_interrupted_again_and_again_ends_the_same_and_measures_nothing_twice(
    racer, journal, tmp_path, every
):
    def search(opened, on_finished=lambda measurement, known: None):
        recorded = RecordedEvaluator(racer, opened, on_finished)
        return beam_search(recorded, [INT8, HALF], 2, width=12, among=4).to_json()

    whole = Journal.open(tmp_path / "whole.sqlite", {"model": "m"})
    expected, measured, found = search(whole), [], None
    whole.close()
    while found is None:
        now = []

        def count(measurement, known, now=now):
            if not known:
                now.append((name_of(measurement.configuration), measurement.sdt is None))
                if len(now) == every:
                    raise EndedError

        try:
            found = search(journal, count)
        except EndedError:
            assert now
        measured += now
    assert found == expected
    assert len(measured) == len(set(measured))


SEARCH = """
import sys
import tiny
from pathlib import Path
import dtm_fast as dtm
from conftest import probes_of
from dtm_fast.plan import RecordedEvaluator
from dtm_fast.plan.beam import beam_search
from dtm_fast.runs import Journal

model = tiny.model_of("llama", num_hidden_layers=4)
evaluator = dtm.Evaluator(model, probes_of(model, 16))
journal = Journal.open(Path(sys.argv[1]), {"model": "m"})
beam_search(RecordedEvaluator(evaluator, journal), [dtm.Int8()], 8, width=4)  # deeper than it will get
"""


def rows_of(path: Path) -> dict[str, list]:
    """What is in a journal that another process writes."""
    if not path.exists():
        return {}
    connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    try:
        return {
            table: connection.execute(f"SELECT * FROM {table} ORDER BY rowid").fetchall()
            for table in ("measurements", "bounds", "notes")
        }
    except sqlite3.OperationalError:  # the tables are not made yet
        return {}
    finally:
        connection.close()


@pytest.mark.process
def test_killed_in_the_midst_of_a_depth_it_ends_in_the_identical_plan(tmp_path, make_probes, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(Path(tiny.__file__).parent))
    path = tmp_path / "killed.sqlite"
    with subprocess.Popen([sys.executable, "-c", SEARCH, str(path)]) as process:
        reached = None
        while reached is None or len(rows_of(path)["bounds"]) < reached + 5:
            assert process.poll() is None
            rows = rows_of(path)
            if reached is None and len(rows.get("notes", [])) > 2:  # two depths are decided, the third is not
                reached = len(rows["bounds"])
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    killed = rows_of(path)
    extended = [json.loads(content)["extended"] for _, content, *_ in killed["notes"]]
    assert extended[:2] == [1, 4]
    assert 3 <= len(extended) < 8
    model = tiny.model_of("llama", num_hidden_layers=4)
    evaluator = dtm.Evaluator(model, make_probes(model, 16))
    plans = []
    for file in (path, tmp_path / "whole.sqlite"):
        opened = Journal.open(file, {"model": "m"})
        plans.append(
            json.dumps(beam_search(RecordedEvaluator(evaluator, opened), [INT8], 3, width=4).to_json())
        )
        opened.close()
    assert plans[0] == plans[1]
    resumed = rows_of(path)["measurements"]
    assert resumed[: len(killed["measurements"])] == killed["measurements"]  # none was measured again
    assert len({row[:2] for row in resumed}) == len(resumed)
