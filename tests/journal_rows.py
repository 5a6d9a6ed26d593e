"""The rows of a journal, read while another process writes it."""

import sqlite3
from pathlib import Path


def finished(run: Path) -> list[tuple]:
    """All rows of the journal with the time at which each was finished, while it is written or after."""
    if not (run / "journal.sqlite").exists():
        return []
    connection = sqlite3.connect(f"file:{run / 'journal.sqlite'}?mode=ro", uri=True)
    try:
        return connection.execute("SELECT * FROM measurements ORDER BY rowid").fetchall()
    except sqlite3.OperationalError:  # the process has not made the table yet
        return []
    finally:
        connection.close()
