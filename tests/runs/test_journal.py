import json
import os
import random
import shutil
import sqlite3
from pathlib import Path

import pytest

from dtm_fast.errors import RunError
from dtm_fast.runs import SCHEMA_VERSION, Journal

IDENTITY = {"model": "a" * 64, "probes": "b" * 64}


def row(i: int, size: int = 40) -> dict:
    """A made-up measurement of some hundred bytes, or of several pages."""
    return {"fdt": [i] * size, "dppl": [1 / (i + 3)] * size}


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "journal.sqlite"


@pytest.fixture
def written(path) -> Path:
    """A closed journal of thirty measurements, three pages each."""
    journal = Journal.open(path, IDENTITY)
    for i in range(30):
        journal.add(f"c{i}", ["dppl"], row(i, 500))
    journal.close()
    return path


def all_of(path: Path) -> list[dict]:
    journal = Journal.open(path)
    rows = list(journal)
    journal.close()
    return rows


def test_what_was_added_is_found_again(path):
    journal = Journal.open(path, IDENTITY)
    journal.add("c", ["kl", "dppl"], row(1))
    assert journal.find("c", ["dppl", "kl"]) == row(1)
    assert journal.find("c", []) == row(1)
    assert journal.find("c", ["perplexity"]) is None
    assert journal.find("d", []) is None
    journal.close()


def test_of_several_that_will_do_the_first_is_found(path):
    journal = Journal.open(path, IDENTITY)
    journal.add("c", ["kl"], row(1))
    journal.add("c", ["dppl", "sdt"], row(2))
    journal.add("c", ["dppl", "kl", "sdt"], row(3))
    assert journal.find("c", ["dppl"]) == row(2)
    assert journal.find("c", ["kl"]) == row(1)
    assert journal.find("c", ["kl", "sdt"]) == row(3)
    journal.close()


def test_the_bound_added_last_is_found_and_is_no_measurement(path):
    journal = Journal.open(path, IDENTITY)
    journal.add_bound("c", {"highest": 9.5})
    journal.add_bound("c", {"highest": 7.25})
    journal.add_bound("d", {"highest": 1})
    journal.close()
    journal = Journal.open(path)
    assert (journal.bound("c"), journal.bound("d"), journal.bound("e")) == (
        {"highest": 7.25},
        {"highest": 1},
        None,
    )
    assert (list(journal), len(journal), journal.find("c", [])) == ([], 0, None)
    journal.close()


def test_a_bound_that_is_not_as_it_was_written_is_damage(path):
    journal = Journal.open(path, IDENTITY)
    journal.add_bound("c", {"highest": 9.5})
    journal.close()
    connection = sqlite3.connect(path)
    connection.execute("""UPDATE bounds SET bound = '{"highest": 9.6}'""")
    connection.commit()
    connection.close()
    with pytest.raises(RunError, match="the journal is damaged"):
        Journal.open(path)


def test_the_note_made_last_is_found_and_is_no_measurement(path):
    journal = Journal.open(path, IDENTITY)
    journal.note("beam depth 1", {"kept": [[0, "a", "int8"]]})
    journal.note("beam depth 1", {"kept": [[0, "b", "int8"], [1, "a", "int8"]]})
    journal.note("beam depth 2", {"kept": []})
    journal.close()
    journal = Journal.open(path)
    assert journal.noted("beam depth 1") == {"kept": [[0, "b", "int8"], [1, "a", "int8"]]}
    assert (journal.noted("beam depth 2"), journal.noted("beam depth 3")) == ({"kept": []}, None)
    assert (list(journal), len(journal), journal.bound("beam depth 1")) == ([], 0, None)
    journal.close()


def test_a_note_is_durable_before_it_returns(path):
    journal = Journal.open(path, IDENTITY)
    journal.note("beam depth 1", {"kept": [7]})
    other = sqlite3.connect(path)
    assert other.execute("SELECT name, content FROM notes").fetchall() == [("beam depth 1", '{"kept": [7]}')]
    other.close()
    journal.close()


@pytest.mark.parametrize(
    "change", ["content = '{\"kept\": [8]}'", "name = 'beam depth 2'", "checksum = 'x'"], ids=str
)
def test_a_note_that_is_not_as_it_was_written_is_damage(path, change):
    journal = Journal.open(path, IDENTITY)
    journal.note("beam depth 1", {"kept": [7]})
    journal.close()
    connection = sqlite3.connect(path)
    connection.execute(f"UPDATE notes SET {change}")
    connection.commit()
    connection.close()
    with pytest.raises(RunError, match="the journal is damaged"):
        Journal.open(path)


def test_rows_come_in_the_order_in_which_they_were_finished_whatever_the_clock_says(path, monkeypatch):
    journal = Journal.open(path, IDENTITY)
    for i, clock in enumerate((30.0, 10.0, 20.0)):
        monkeypatch.setattr("time.time", lambda clock=clock: clock)
        journal.add(f"c{2 - i}", [], row(i))
    assert list(journal) == [row(0), row(1), row(2)]
    assert len(journal) == 3
    journal.close()


def test_reopened_it_holds_what_it_held(written):
    journal = Journal.open(written, IDENTITY)
    assert list(journal) == [row(i, 500) for i in range(30)]
    assert journal.identity == IDENTITY
    journal.close()


def test_its_identity_is_that_of_the_first_time(written):
    journal = Journal.open(written, {"model": "another"})
    assert journal.identity == IDENTITY
    journal.close()


def test_each_row_is_durable_before_add_returns(path):
    journal = Journal.open(path, IDENTITY)
    assert journal._connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert journal._connection.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL
    journal.add("c", [], row(1))
    other = sqlite3.connect(path)
    assert other.execute("SELECT count(*) FROM measurements").fetchone() == (1,)
    other.close()
    journal.close()


def test_a_journal_that_is_being_written_can_be_read(path):
    writer = Journal.open(path, IDENTITY)
    writer.add("c", [], row(1))
    assert all_of(path) == [row(1)]
    writer.add("d", [], row(2))
    assert all_of(path) == [row(1), row(2)]
    writer.close()


def test_a_journal_in_a_read_only_folder_is_read(written, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    before = {file: file.stat().st_mtime_ns for file in (written, written.parent)}
    assert len(all_of(written)) == 30
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert [file.name for file in written.parent.iterdir()] == [written.name]


def test_a_log_in_a_read_only_folder_is_read_or_named(path, tmp_path, monkeypatch):
    writer = Journal.open(path, IDENTITY)
    writer.add("c", [], row(1))
    (tmp_path / "copy").mkdir()
    for file in (path, path.with_name("journal.sqlite-wal")):
        shutil.copy(file, tmp_path / "copy")
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert all_of(path) == [row(1)]
    with pytest.raises(
        RunError, match=r"its log journal\.sqlite-wal cannot be read in a read-only folder: copy"
    ):
        Journal.open(tmp_path / "copy" / path.name)
    writer.close()


def test_a_process_killed_before_the_schema_was_committed_leaves_a_file_that_works(path):
    path.touch()
    journal = Journal.open(path, IDENTITY)
    journal.add("c", [], row(1))
    assert journal.identity == IDENTITY
    journal.close()


def test_a_schema_that_cannot_be_committed_leaves_a_file_that_works(path, monkeypatch):
    monkeypatch.setattr(
        "dtm_fast.runs.journal._SCHEMA", ("CREATE TABLE meta (name, value)", "CREATE nonsense")
    )
    with pytest.raises(RunError, match="syntax error"):
        Journal.open(path, IDENTITY)
    monkeypatch.undo()
    journal = Journal.open(path, IDENTITY)
    journal.add("c", [], row(1))
    journal.close()


def test_an_empty_file_has_nothing_to_read_and_is_no_damage(path):
    path.touch()
    with pytest.raises(RunError, match="nothing is in the journal yet"):
        Journal.open(path)
    assert not list(path.parent.glob("*damaged*"))


@pytest.mark.parametrize("version", [SCHEMA_VERSION + 1, 0])
def test_another_schema_version_is_refused_and_nothing_is_touched(written, version):
    connection = sqlite3.connect(written)
    connection.execute("UPDATE meta SET value = ? WHERE name = 'schema_version'", (str(version),))
    connection.commit()
    connection.close()
    before = written.read_bytes()
    with pytest.raises(
        RunError, match=rf"written with schema version {version}, this dtm_fast reads {SCHEMA_VERSION}"
    ):
        Journal.open(written, IDENTITY)
    assert written.read_bytes() == before
    assert not list(written.parent.glob("*damaged*"))


VERSION = b"schema_version%d" % SCHEMA_VERSION
DAMAGES = {
    "header": lambda b: b"this is no SQLite" + b[17:],
    "all": lambda b: b"garbage" * 999,
    "truncated": lambda b: b[: len(b) // 2],
    "a page in the middle": lambda b: (
        b[: len(b) // 2 & -4096] + bytes(4096) + b[(len(b) // 2 & -4096) + 4096 :]
    ),
    "the tables page": lambda b: b[:100] + bytes(3000) + b[3100:],
    "a digit inside a measurement": lambda b: b.replace(b"[7, 7, 7,", b"[7, 8, 7,", 1),
    "a letter that is none": lambda b: b.replace(b"[7, 7, 7,", b"[7, \xff, 7,", 1),
    "the version": lambda b: b.replace(VERSION, b"schema_versionx", 1),
    "the version's name": lambda b: b.replace(VERSION, VERSION.replace(b"e", b"a"), 1),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_journal_is_refused_and_kept_as_it_is(written, damage):
    sound = written.read_bytes()
    damaged = DAMAGES[damage](sound)
    assert damaged != sound
    written.write_bytes(damaged)
    expected = (
        r"the journal is damaged; a copy is kept as journal\.sqlite\.damaged-1; delete journal\.sqlite to"
    )
    with pytest.raises(RunError, match=expected):
        Journal.open(written, IDENTITY)
    assert written.read_bytes() == damaged
    assert written.with_name("journal.sqlite.damaged-1").read_bytes() == damaged


def test_the_same_damage_is_copied_once_and_another_beside_it(written):
    sound = written.read_bytes()
    for damage in ("header", "header", "truncated"):
        written.write_bytes(DAMAGES[damage](sound))
        with pytest.raises(RunError):
            Journal.open(written, IDENTITY)
    copies = sorted(p.name for p in written.parent.glob("*damaged*"))
    assert copies == ["journal.sqlite.damaged-1", "journal.sqlite.damaged-2"]


def test_the_log_is_copied_with_a_damaged_journal(path):
    writer = Journal.open(path, IDENTITY)
    for i in range(30):
        writer.add(f"c{i}", [], row(i, 500))
    writer._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    writer.add("late", [], row(99))
    log = path.with_name("journal.sqlite-wal").read_bytes()
    assert log
    main = path.read_bytes()
    killed = path.parent / "killed"  # what SIGKILL leaves: both files, no process
    killed.mkdir()
    damaged = DAMAGES["a digit inside a measurement"](main)
    (killed / path.name).write_bytes(damaged)
    (killed / "journal.sqlite-wal").write_bytes(log)
    writer.close()
    with pytest.raises(RunError, match="damaged"):
        Journal.open(killed / path.name, IDENTITY)
    assert (killed / "journal.sqlite.damaged-1").read_bytes() == damaged
    assert (killed / "journal.sqlite.damaged-1-wal").read_bytes() == log


def test_whatever_byte_is_another_nothing_wrong_is_read(written):
    sound, draw = written.read_bytes(), random.Random(0)
    expected, refused = [row(i, 500) for i in range(30)], 0
    places = [*range(100), *(draw.randrange(len(sound)) for _ in range(60))]
    for place in places:
        written.write_bytes(
            sound[:place] + bytes([sound[place] ^ draw.randrange(1, 256)]) + sound[place + 1 :]
        )
        try:
            rows = all_of(written)
        except RunError:
            refused += 1
        else:
            assert sorted(map(json.dumps, rows)) == sorted(map(json.dumps, expected)), place
    assert refused > 50


def test_a_disk_that_is_full_keeps_what_was_measured(path):
    journal = Journal.open(path, IDENTITY)
    journal.add("c", [], row(1))
    pages = journal._connection.execute("PRAGMA page_count").fetchone()[0]
    journal._connection.execute(f"PRAGMA max_page_count = {pages + 3}")  # SQLite's own SQLITE_FULL
    with pytest.raises(RunError, match=r"journal\.sqlite: the disk is full; what was measured is kept"):
        journal.add("d", [], row(2, 50_000))
    assert list(journal) == [row(1)]
    journal.add("e", [], row(3))  # a smaller one still fits
    journal.close()
    assert all_of(path) == [row(1), row(3)]


def test_a_measurement_that_is_no_json_is_not_half_written(path):
    journal = Journal.open(path, IDENTITY)
    with pytest.raises(TypeError):
        journal.add("c", [], {"fdt": object()})
    assert len(journal) == 0
    journal.close()


def test_a_folder_is_no_journal(path):
    path.mkdir()
    with pytest.raises(RunError, match="the journal cannot be used: unable to open database file"):
        Journal.open(path, IDENTITY)
