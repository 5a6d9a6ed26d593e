"""A SQLite journal: what was measured, and what a search decided, each committed before the next begins."""

import filecmp
import hashlib
import json
import os
import shutil
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dtm_fast.errors import RunError

SCHEMA_VERSION = 3

_SCHEMA = (
    "CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL)",
    """CREATE TABLE measurements (
        configuration TEXT NOT NULL,  -- SHA-256 of the configuration
        metrics TEXT NOT NULL,        -- JSON list of the metrics beyond FDT, sorted
        measured TEXT NOT NULL,       -- JSON of the measurement
        finished REAL NOT NULL,       -- seconds since 1970
        checksum TEXT NOT NULL,       -- SHA-256 of the three texts: SQLite notices no damage inside a text
        PRIMARY KEY (configuration, metrics)
    )""",
    """CREATE TABLE bounds (
        configuration TEXT PRIMARY KEY,  -- SHA-256 of a configuration that a race dropped
        bound TEXT NOT NULL,             -- JSON of what is known of it
        finished REAL NOT NULL,          -- as above
        checksum TEXT NOT NULL           -- SHA-256 of the two texts
    )""",
    """CREATE TABLE notes (
        name TEXT PRIMARY KEY,   -- what a search calls its decision
        content TEXT NOT NULL,   -- JSON of what it has decided
        finished REAL NOT NULL,  -- as above
        checksum TEXT NOT NULL   -- SHA-256 of the two texts
    )""",
)


class EmptyJournalError(RunError):
    """A journal in which nothing is yet: its process ended before it had begun."""


class Journal:
    """The measurements of one model on one set of probes.

    The write-ahead log with ``synchronous=FULL`` makes each row durable before ``add`` returns, so that
    SIGKILL or a power cut loses at most the measurement in flight.
    """

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        """Use ``Journal.open``."""
        self._connection = connection
        self.path = path

    @classmethod
    def open(cls, path: Path, identity: dict[str, Any] | None = None) -> "Journal":
        """The journal at ``path``; a new one where there is none and an ``identity`` is given.

        Args:
            path: the SQLite file.
            identity: what a new journal is of (model, probes, …): name → JSON value.

        Raises:
            RunError: if it is of another schema version, damaged (then a copy is kept beside it), or cannot
                be read or written.
            EmptyJournalError: if nothing is in it, and no ``identity`` is given.
        """
        with _errors(path):
            connection = _connection(path, to_write=identity is not None)
            try:
                version = _schema_version(connection)
                if version is None and identity is not None:
                    _write_schema(connection, identity)
                    version = SCHEMA_VERSION
                if version is None:
                    raise EmptyJournalError(f"{path}: nothing is in the journal yet")
                if version != SCHEMA_VERSION:
                    raise RunError(
                        f"{path}: written with schema version {version}, this dtm_fast reads {SCHEMA_VERSION}"
                    )
                _check_sound(connection)
            except BaseException as error:
                try:
                    # The copy comes before closing, which would fold the log into the file.
                    if _is_damage(error):
                        copy = _keep_copy(path)
                        raise RunError(
                            f"{path}: the journal is damaged; a copy is kept as {copy.name}; "
                            f"delete {path.name} to start anew"
                        ) from error
                finally:
                    connection.close()
                raise
        return cls(connection, path)

    @property
    def identity(self) -> dict[str, Any]:
        """What a new journal was said to be of."""
        with _errors(self.path):
            rows = self._connection.execute("SELECT name, value FROM meta").fetchall()
        return {name: json.loads(value) for name, value in rows if name != "schema_version"}

    def add(self, configuration: str, metrics: list[str], measured: dict[str, Any]) -> None:
        """Commits one finished measurement.

        Args:
            configuration: the configuration's identity.
            metrics: names of the metrics measured beyond FDT.
            measured: JSON form of the measurement.

        Raises:
            RunError: if it cannot be written; what was committed before stays.
        """
        texts = (configuration, json.dumps(sorted(metrics)), json.dumps(measured))
        row = (*texts, time.time(), _checksum(*texts))
        with _errors(self.path):
            self._connection.execute("INSERT OR REPLACE INTO measurements VALUES (?, ?, ?, ?, ?)", row)

    def find(self, configuration: str, metrics: list[str]) -> dict[str, Any] | None:
        """The measurement of ``configuration`` if it was finished with at least these metrics.

        The first of several, so that what a search finds does not change by what is measured after it.
        """
        with _errors(self.path):
            rows = self._connection.execute(
                "SELECT metrics, measured FROM measurements WHERE configuration = ? ORDER BY rowid",
                (configuration,),
            ).fetchall()
        for stored, measured in rows:
            if set(metrics) <= set(json.loads(stored)):
                found: dict[str, Any] = json.loads(measured)
                return found
        return None

    def add_bound(self, configuration: str, bound: dict[str, Any]) -> None:
        """Commits what is known of a configuration that was not measured to its end; in place of what was known.

        Raises:
            RunError: as ``add``.
        """
        texts = (configuration, json.dumps(bound))
        with _errors(self.path):
            self._connection.execute(
                "INSERT OR REPLACE INTO bounds VALUES (?, ?, ?, ?)", (*texts, time.time(), _checksum(*texts))
            )

    def bound(self, configuration: str) -> dict[str, Any] | None:
        """What ``add_bound`` was given last for this configuration."""
        with _errors(self.path):
            found = self._connection.execute(
                "SELECT bound FROM bounds WHERE configuration = ?", (configuration,)
            ).fetchone()
        return None if found is None else json.loads(found[0])

    def note(self, name: str, content: dict[str, Any]) -> None:
        """Commits what a search has decided; in place of what was noted under this name.

        Args:
            name: must say all that the decision depends on beyond this journal's measurements: a search that is resumed
                takes what it finds under it as decided.
            content: JSON values.

        Raises:
            RunError: as ``add``.
        """
        texts = (name, json.dumps(content))
        with _errors(self.path):
            self._connection.execute(
                "INSERT OR REPLACE INTO notes VALUES (?, ?, ?, ?)", (*texts, time.time(), _checksum(*texts))
            )

    def noted(self, name: str) -> dict[str, Any] | None:
        """What ``note`` was given last under this name."""
        with _errors(self.path):
            found = self._connection.execute("SELECT content FROM notes WHERE name = ?", (name,)).fetchone()
        return None if found is None else json.loads(found[0])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """All measurements in the order in which they were finished."""
        with _errors(self.path):
            rows = self._connection.execute("SELECT measured FROM measurements ORDER BY rowid").fetchall()
        return (json.loads(row[0]) for row in rows)

    def __len__(self) -> int:
        """Number of finished measurements."""
        with _errors(self.path):
            return int(self._connection.execute("SELECT count(*) FROM measurements").fetchone()[0])

    def close(self) -> None:
        """Closes the database and folds the log into it."""
        self._connection.close()


def _connection(path: Path, to_write: bool) -> sqlite3.Connection:
    """Each of its statements commits by itself unless it stands between BEGIN and COMMIT."""
    if to_write or os.access(path.parent, os.W_OK):
        return sqlite3.connect(path, isolation_level=None)
    # SQLite reads a write-ahead log through a file beside it; where it cannot make one, it must be told that nobody
    # writes, and then looks at no log.
    log, shared = (path.with_name(path.name + suffix) for suffix in ("-wal", "-shm"))
    if not log.exists() or not log.stat().st_size:
        return sqlite3.connect(f"{path.resolve().as_uri()}?immutable=1", uri=True, isolation_level=None)
    if not shared.exists():
        raise RunError(
            f"{path}: its log {log.name} cannot be read in a read-only folder: copy the run elsewhere"
        )
    return sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, isolation_level=None)


def _schema_version(connection: sqlite3.Connection) -> int | None:
    """The version that the journal says it is of; None for an empty file."""
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    if connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0:
        return None
    return int(connection.execute("SELECT value FROM meta WHERE name = 'schema_version'").fetchone()[0])


def _write_schema(connection: sqlite3.Connection, identity: dict[str, Any]) -> None:
    meta = [
        (name, json.dumps(value)) for name, value in {"schema_version": SCHEMA_VERSION, **identity}.items()
    ]
    connection.execute("BEGIN IMMEDIATE")
    for statement in _SCHEMA:
        connection.execute(statement)
    connection.executemany("INSERT INTO meta VALUES (?, ?)", meta)
    connection.execute("COMMIT")


def _check_sound(connection: sqlite3.Connection) -> None:
    """Raises sqlite3.DatabaseError if any of the file is not as it was written."""
    found = connection.execute("PRAGMA integrity_check").fetchone()[0]
    if found != "ok":
        raise sqlite3.DatabaseError(f"malformed: {found}")
    for columns in (
        "configuration, metrics, measured, checksum FROM measurements",
        "configuration, bound, checksum FROM bounds",
        "name, content, checksum FROM notes",
    ):
        rows = connection.execute(f"SELECT {columns}")
        if any(_checksum(*texts) != checksum for *texts, checksum in rows):
            raise sqlite3.DatabaseError("malformed: a row is not as it was written")


def _checksum(*texts: str) -> str:
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


def _is_damage(error: BaseException) -> bool:
    # A damaged page can make any text of any column: no number where one was, no text that can be decoded.
    if isinstance(error, (TypeError, ValueError)) and not isinstance(error, RunError):
        return True
    signs = ("not a database", "malformed", "no such table", "no such column", "unsupported file", "decode")
    return isinstance(error, sqlite3.Error) and any(sign in str(error) for sign in signs)


def _keep_copy(path: Path) -> Path:
    """A copy of the file and its log; the one that is there already if it is of the same bytes."""
    number = 1
    while (copy := path.with_name(f"{path.name}.damaged-{number}")).exists():
        if filecmp.cmp(path, copy, shallow=False):
            return copy
        number += 1
    try:
        for suffix in ("", "-wal"):
            file = path.with_name(path.name + suffix)
            if file.exists() and file.stat().st_size:
                shutil.copy2(file, copy.with_name(copy.name + suffix))
    except OSError as error:
        raise RunError(
            f"{path}: the journal is damaged, and no copy can be kept: {error.strerror}"
        ) from error
    return copy


@contextmanager
def _errors(path: Path) -> Iterator[None]:
    """SQLite's errors as one line that says what to do."""
    try:
        yield
    except sqlite3.Error as error:
        if "full" in str(error):
            raise RunError(
                f"{path}: the disk is full; what was measured is kept: free some space and run the same command"
            ) from error
        raise RunError(f"{path}: the journal cannot be used: {error}") from error
