"""Where dtm_fast keeps what it can compute again: converted models and probes."""

import os
from pathlib import Path

from dtm_fast.errors import InputError


def cache_folder() -> Path:
    """``$DTM_FAST_CACHE``, or ``dtm_fast`` in the user's cache folder (``$XDG_CACHE_HOME`` or ``~/.cache``).

    Raises:
        InputError: nobody knows where the home folder is.
    """
    named = os.environ.get("DTM_FAST_CACHE")
    try:
        if named:
            return Path(named).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dtm_fast"
    except RuntimeError as error:
        said = "is not set" if named is None else f"is {named!r}"
        raise InputError(f"there is no cache folder, for DTM_FAST_CACHE {said}: {error}") from error
