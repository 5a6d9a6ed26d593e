"""Where dtm_fast keeps what it can compute again: converted models and probes."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """``$DTM_FAST_CACHE``, or ``dtm_fast`` in the user's cache folder (``$XDG_CACHE_HOME`` or ``~/.cache``).

    Raises:
        OSError: nobody knows where the home folder is.
    """
    named = os.environ.get("DTM_FAST_CACHE")
    try:
        if named:
            return Path(named).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dtm_fast"
    except RuntimeError as error:
        raise OSError(f"no cache folder, DTM_FAST_CACHE is {named!r}: {error}") from error
