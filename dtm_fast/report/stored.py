"""Values of a run's files, checked as they are read: what is wrong becomes one line that names the file."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dtm_fast.errors import InputError, RunError
from dtm_fast.runs import RunDirectory


@contextmanager
def reading(path: Path, kind: str) -> Iterator[None]:
    """Raises RunError, with the path, for whatever is wrong with what is read inside.

    Args:
        path: the file.
        kind: what it should be, such as ``"a comparison"``.
    """
    try:
        yield
    except RunError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise RunError(f"{path}: not {kind} of dtm_fast: {_said(error)}") from error


def _said(error: Exception) -> str:
    """An InputError says what is wrong by itself; of the others the kind says more than the message."""
    if isinstance(error, KeyError):
        return f"{error} is missing"
    return str(error) if isinstance(error, InputError) else repr(error)


def values_in(directory: RunDirectory, name: str) -> dict[str, Any]:
    """The content of the JSON file ``name``, which must be there and hold names and values."""
    stored = directory.read_json(name)
    if not isinstance(stored, dict):
        raise InputError("it holds no names and values")
    return stored


def number(value: Any) -> float:
    """``value``, which must be a number; not finite ones are numbers too."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InputError(f"{value!r} is no number")
    return float(value)


def finite(value: Any) -> float:
    """``value``, which must be a finite number."""
    if not math.isfinite(number(value)):
        raise InputError(f"{value!r} is not finite")
    return float(value)


def share(value: Any) -> float:
    """``value``, which must lie in 0 … 1."""
    if not 0 <= finite(value) <= 1:
        raise InputError(f"{value!r} does not lie in 0 … 1")
    return float(value)


def whole(value: Any, least: int = 0) -> int:
    """``value``, which must be a whole number of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{value!r} is no whole number of at least {least}")
    return value


def text(value: Any) -> str:
    """``value``, which must be a text."""
    if not isinstance(value, str):
        raise InputError(f"{value!r} is no text")
    return value


def entries(value: Any) -> list[Any]:
    """``value``, which must be a list."""
    if not isinstance(value, list):
        raise InputError(f"{value!r} is no list")
    return value
