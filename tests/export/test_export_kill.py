"""An export that is killed leaves no half folder under the name it was to have."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dtm_fast.export import load_export, validate

pytestmark = pytest.mark.process

# Says for every number that it reads the id of a child, which exports into out-NUMBER, out-NUMBER + 1, … until it is
# killed.
EXPORTER = """
import itertools, os, sys
import tiny
from made_export import MIXED, plan_for
from dtm_fast.export import export_checkpoint
model, tokenizer = tiny.model_of("llama", num_hidden_layers=6), tiny.tokenizer_of_characters()
plan = plan_for(model, MIXED)
for line in iter(sys.stdin.readline, ""):
    child = os.fork()
    if child == 0:
        for index in itertools.count(int(line)):
            export_checkpoint(model, tokenizer, plan, sys.argv[1] + f"/out-{index}")
    print(child, flush=True)
    os.waitpid(child, 0)
    print("killed", flush=True)
"""
TESTS = Path(__file__).parents[1]


@pytest.fixture
def exporter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[subprocess.Popen[str]]:
    """A process that forks exporters, so that torch is imported once."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # OpenMP's threads do not live on in a fork
    paths = f"import sys; sys.path[:0] = [{str(TESTS)!r}, {str(TESTS / 'export')!r}]"
    with subprocess.Popen(
        [sys.executable, "-c", paths + EXPORTER, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        yield process
        process.stdin.close()
        assert process.wait(60) == 0


def kill_in_an_export(exporter: subprocess.Popen[str], folder: Path, first: int, delay: float) -> None:
    """Kills a child ``delay`` seconds after it has finished its first export."""
    exporter.stdin.write(f"{first}\n")
    exporter.stdin.flush()
    child = int(exporter.stdout.readline())
    while not (folder / f"out-{first}").exists():
        time.sleep(0.001)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    assert exporter.stdout.readline() == "killed\n"


def test_folders_are_there_whole_or_not_at_all(exporter, tmp_path):
    draw, first, halves = random.Random(3), 0, 0
    for _ in range(6):
        kill_in_an_export(exporter, tmp_path, first, draw.uniform(0, 0.15))
        whole = sorted(tmp_path.glob("out-*"), key=lambda folder: int(folder.name[4:]))
        names = {file.name for file in whole[0].iterdir()}
        for folder in whole[first:]:
            assert {file.name for file in folder.iterdir()} == names
            assert validate(folder) == []
        left = [path.name for path in tmp_path.iterdir() if path not in whole]
        # The next one begins where this was killed, and clears away what is left of it.
        first = len(whole)
        assert [re.sub("-[0-9a-f]{8}$", "", name) for name in left] in ([], [f".unfinished-out-{first}"])
        halves += len(left)
    load_export(whole[-1])
    assert halves, "none was killed in its midst"


def test_what_a_killed_export_left_is_cleared_by_the_next(export, tmp_path):
    left = tmp_path / ".unfinished-out"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    exported = export()
    assert list(tmp_path.iterdir()) == [exported.folder]
    assert validate(exported.folder) == []
