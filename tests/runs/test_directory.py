import fcntl
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from dtm_fast.errors import RunError
from dtm_fast.runs import RunDirectory

IDENTITY = {"model": "a" * 64, "probes": "b" * 64}


@pytest.fixture
def run(tmp_path) -> Path:
    """A run with one measurement, left."""
    with RunDirectory.resume(tmp_path / "run", IDENTITY) as directory:
        directory.journal.add("c", [], {"fdt": [1]})
    return tmp_path / "run"


def assert_still_there(run: Path) -> None:
    with RunDirectory.resume(run, IDENTITY) as directory:
        assert list(directory.journal) == [{"fdt": [1]}]


def test_a_new_directory_is_made_with_its_parents(tmp_path):
    with RunDirectory.resume(tmp_path / "a" / "b", IDENTITY) as directory:
        assert directory.journal.identity == IDENTITY
    assert (tmp_path / "a" / "b" / "journal.sqlite").is_file()


def test_a_name_that_is_no_text_is_written_as_python_writes_it(run):
    with RunDirectory.resume(run, IDENTITY) as directory:
        assert directory.write_text("report.html", "run odd\udcff ←").read_text() == "run odd\\udcff ←"


def test_a_run_is_resumed_with_what_it_has(run):
    assert_still_there(run)


def test_left_a_run_has_no_log_beside_its_journal(run):
    assert sorted(p.name for p in run.iterdir()) == ["journal.sqlite", "lock"]


@pytest.mark.parametrize("name", IDENTITY)
def test_a_run_of_something_else_is_refused(run, name):
    with pytest.raises(
        RunError, match=rf"this run\'s {name} differs: begun with [ab]{{12}}, now c{{12}}; choose"
    ):
        RunDirectory.resume(run, IDENTITY | {name: "c" * 64})
    assert_still_there(run)


def test_an_identity_with_more_or_less_names_is_another(run):
    for identity in ({"model": "a" * 64}, IDENTITY | {"seed": 1}):
        with pytest.raises(RunError, match=r"this run's (probes|seed) differs"):
            RunDirectory.resume(run, identity)
    assert_still_there(run)


def test_a_run_in_use_is_refused_and_free_again_afterwards(run):
    with (
        RunDirectory.resume(run, IDENTITY),
        pytest.raises(RunError, match="in use by another dtm-fast process"),
    ):
        RunDirectory.resume(run, IDENTITY)
    assert_still_there(run)


def test_a_refused_run_is_not_held(run):
    with pytest.raises(RunError):
        RunDirectory.resume(run, {})
    assert_still_there(run)


def test_a_run_of_a_process_that_was_killed_is_free(run):
    script = (
        "import fcntl, os, sys\n"
        "handle = os.open(sys.argv[1], os.O_RDWR)\n"
        "fcntl.flock(handle, fcntl.LOCK_EX)\n"
        "print('held', flush=True)\n"
        "sys.stdin.read()"
    )
    arguments = [sys.executable, "-c", script, str(run / "lock")]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(RunError, match="in use"):
            RunDirectory.resume(run, IDENTITY)
        process.kill()
        process.wait()
        assert_still_there(run)


def test_a_run_in_use_can_be_read(run):
    with RunDirectory.resume(run, IDENTITY), RunDirectory.read(run) as reader:
        assert list(reader.journal) == [{"fdt": [1]}]


def test_a_damaged_run_is_not_held_after_it_was_refused(run):
    sound = (run / "journal.sqlite").read_bytes()
    (run / "journal.sqlite").write_bytes(b"x" * 100)
    with pytest.raises(RunError, match="damaged"):
        RunDirectory.resume(run, IDENTITY)
    (run / "journal.sqlite").write_bytes(sound)
    assert_still_there(run)


@pytest.mark.parametrize("where", ["{file}", "{file}/run", "/proc/run", "/sys/run"])
def test_a_place_that_cannot_be_written_is_named(tmp_path, where):
    (tmp_path / "file").write_text("content")
    path = Path(where.format(file=tmp_path / "file"))
    with pytest.raises(RunError, match=f"{path}: cannot write a run there: [A-Z]"):
        RunDirectory.resume(path, IDENTITY)
    assert (tmp_path / "file").read_text() == "content"


def test_a_check_leaves_nothing_where_there_was_nothing(tmp_path):
    RunDirectory.check(tmp_path / "a" / "b")
    (tmp_path / "empty").mkdir()
    RunDirectory.check(tmp_path / "empty", IDENTITY)
    assert list(tmp_path.rglob("*")) == [tmp_path / "empty"]


def test_a_check_refuses_what_could_not_be_resumed(run):
    before = sorted(run.iterdir())
    RunDirectory.check(run)
    RunDirectory.check(run, {"model": "a" * 64})
    with pytest.raises(RunError, match=r"this run's model differs: begun with a{12}, now c{12}; choose"):
        RunDirectory.check(run, {"model": "c" * 64})
    with RunDirectory.resume(run, IDENTITY), pytest.raises(RunError, match="in use by another"):
        RunDirectory.check(run)
    with pytest.raises(RunError, match=r"/proc/run: cannot write a run there: [A-Z]"):
        RunDirectory.check(Path("/proc/run"))
    assert sorted(run.iterdir()) == before
    assert_still_there(run)


def test_a_check_takes_a_journal_that_was_not_begun(tmp_path):
    (tmp_path / "journal.sqlite").touch()
    RunDirectory.check(tmp_path, IDENTITY)
    (tmp_path / "journal.sqlite").write_bytes(b"x" * 100)
    with pytest.raises(RunError, match="damaged"):
        RunDirectory.check(tmp_path, IDENTITY)


@pytest.mark.parametrize("name", ["nowhere", "empty"])
def test_reading_a_run_that_is_none_makes_none(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match=rf"{name}: no run there \(no journal\.sqlite\)"):
        RunDirectory.read(tmp_path / name)
    assert [p.name for p in tmp_path.rglob("*")] == ["empty"]


def test_files_are_written_whole_and_readable_by_others(run):
    with RunDirectory.resume(run, IDENTITY) as directory:
        path = directory.write_json("plan.json", {"é": [1, 0.1]})
        assert directory.read_json("plan.json") == {"é": [1, 0.1]}
    assert json.loads(path.read_text()) == {"é": [1, 0.1]}
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_a_file_that_cannot_be_written_leaves_the_old_one_and_nothing_else(run, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with RunDirectory.resume(run, IDENTITY) as directory:
        directory.write_text("plan.json", "old")
        names = sorted(p.name for p in run.iterdir())
        monkeypatch.setattr(os, "replace", full)
        with pytest.raises(RunError, match=r"plan\.json: cannot be written: No space left on device"):
            directory.write_text("plan.json", "new")
        assert sorted(p.name for p in run.iterdir()) == names
    assert (run / "plan.json").read_text() == "old"
    assert_still_there(run)


def test_a_file_that_is_not_there_reads_as_none(run):
    with RunDirectory.read(run) as directory:
        assert directory.read_json("plan.json") is None


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe{}"])
def test_a_file_that_is_no_json_is_named(run, content):
    (run / "plan.json").write_bytes(content)
    with RunDirectory.read(run) as directory, pytest.raises(RunError, match=r"plan\.json: cannot be read: "):
        directory.read_json("plan.json")


def test_a_lock_that_was_taken_away_keeps_nobody_out(tmp_path, monkeypatch):
    """Another process looked, and took its new file away between our opening and our locking it."""
    flock = fcntl.flock

    def taken_away(file, how):
        (tmp_path / "lock").unlink()
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", taken_away)
    with pytest.raises(RunError, match="in use by another dtm-fast process"):
        RunDirectory.resume(tmp_path, IDENTITY)
    monkeypatch.undo()
    RunDirectory.resume(tmp_path, IDENTITY).close()
