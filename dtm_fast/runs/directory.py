"""A run directory: the journal and the files made from it, held by one process at a time."""

import fcntl
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import closing, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from dtm_fast.errors import RunError
from dtm_fast.runs.journal import EmptyJournalError, Journal


class RunDirectory:
    """``runs/NAME/`` with ``journal.sqlite``, ``run.json``, ``plan.json`` or ``comparison.json``, and the report.

    Searches with other probes or trainings have folders within: ``confirming``, ``round-1`` and so on.

    ``with RunDirectory.resume(path, identity) as run:`` makes or reopens it for writing;
    ``RunDirectory.read(path)`` opens one that exists, to report on it.
    """

    def __init__(self, path: Path, journal: Journal, lock: int | None) -> None:
        """Use ``RunDirectory.resume`` or ``RunDirectory.read``."""
        self.path = path
        self.journal = journal
        self._lock = lock

    @classmethod
    def resume(cls, path: Path, identity: dict[str, Any]) -> "RunDirectory":
        """The run at ``path``, new or as it was left; only for what ``identity`` names.

        Args:
            path: the directory; made if it is not there.
            identity: name → JSON value; all must be equal to those the run was begun with.

        Raises:
            RunError: it is of another model, probes or schema version, damaged, in use or not writable.
        """
        lock = _locked(path)
        try:
            journal = Journal.open(path / "journal.sqlite", identity)
            try:
                _check_begun(path, journal.identity, identity, identity.keys() | journal.identity.keys())
            except BaseException:
                journal.close()
                raise
        except BaseException:
            os.close(lock)
            raise
        return cls(path, journal, lock)

    @classmethod
    def check(cls, path: Path, known: Mapping[str, Any] | None = None) -> None:
        """Looks whether ``resume`` could take up the run at ``path``, and leaves nothing there that was not.

        Args:
            path: the directory.
            known: of the identity, what is known so far.

        Raises:
            RunError: as ``resume``.
        """
        file = path / "lock"
        is_new = not os.path.lexists(file)
        made = [each for each in (path, *path.parents) if not os.path.lexists(each)]
        try:
            lock = _locked(path)
            try:
                if (path / "journal.sqlite").is_file():
                    with (
                        suppress(EmptyJournalError),
                        closing(Journal.open(path / "journal.sqlite")) as journal,
                    ):
                        _check_begun(path, journal.identity, known or {}, known or {})
            finally:
                if is_new:  # while it is held: it is nobody else's
                    file.unlink()
                os.close(lock)
        finally:
            for each in made:
                with suppress(OSError):
                    each.rmdir()

    @classmethod
    def read(cls, path: Path) -> "RunDirectory":
        """The run at ``path``, as far as it got.

        Raises:
            RunError: there is none, or its journal cannot be read.
        """
        if not (path / "journal.sqlite").is_file():
            raise RunError(f"{path}: no run there (no journal.sqlite)")
        return cls(path, Journal.open(path / "journal.sqlite"), None)

    def write_text(self, name: str, content: str) -> Path:
        """Writes the file ``name`` whole or not at all, and returns its path."""
        # The names of files that it tells may be no text.
        return self.write_bytes(name, content.encode(errors="backslashreplace"))

    def write_bytes(self, name: str, content: bytes) -> Path:
        """Writes the file ``name`` whole or not at all, and returns its path."""
        try:
            handle, unfinished = tempfile.mkstemp(dir=self.path, prefix=f".{name}-")
            try:
                with os.fdopen(handle, "wb") as stream:
                    stream.write(content)
                os.chmod(unfinished, 0o644)
                os.replace(unfinished, self.path / name)
            except BaseException:
                os.unlink(unfinished)
                raise
        except OSError as error:
            raise RunError(f"{self.path / name}: cannot be written: {error.strerror}") from error
        return self.path / name

    def write_json(self, name: str, content: dict[str, Any]) -> Path:
        """Writes the file ``name`` as indented JSON, whole or not at all, and returns its path."""
        return self.write_text(name, json.dumps(content, indent=2) + "\n")

    def read_json(self, name: str) -> dict[str, Any] | None:
        """The content of the JSON file ``name``; None where there is no such file.

        Raises:
            RunError: if it is not JSON.
        """
        try:
            content: dict[str, Any] = json.loads((self.path / name).read_text())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise RunError(f"{self.path / name}: cannot be read: {error}") from error
        return content

    def close(self) -> None:
        """Closes the journal and lets other processes in."""
        self.journal.close()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> "RunDirectory":
        """Itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Closes it."""
        self.close()


def _locked(path: Path) -> int:
    """The handle that holds the directory, which is made if it is not there."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise RunError(f"{path}: cannot write a run there: {error.strerror}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Who only looks takes a new file away again; held without its name, it would keep nobody out.
        if os.path.samestat(os.fstat(lock), os.stat(path / "lock")):
            return lock
    except OSError:
        pass
    os.close(lock)
    raise RunError(f"{path}: in use by another dtm-fast process")


def _check_begun(path: Path, begun: Mapping[str, Any], now: Mapping[str, Any], names: Iterable[str]) -> None:
    """Raises RunError where a run was begun with something else of these names."""
    for name in sorted(names):
        if begun.get(name) != now.get(name):
            raise RunError(
                f"{path}: this run's {name} differs: begun with {_short(begun.get(name))}, now "
                f"{_short(now.get(name))}; choose another run directory"
            )


def _short(value: object) -> str:
    text = str(value)
    return text[:12] if len(text) == 64 else text
