"""Where the time of the evaluator goes: its parts timed from outside, each without those inside it."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from dtm_fast.measure import doubts, first_pass
from dtm_fast.measure.compressed_weights import CompressedWeights
from dtm_fast.measure.fused_layers import FusedLayers
from dtm_fast.measure.head import Head

PARTS: tuple[tuple[str, Any, str], ...] = (
    ("compressing and packing weights", CompressedWeights, "packed"),
    ("layers", FusedLayers, "run"),
    ("head", Head, "decide"),
    ("finer arithmetic for what is in doubt", first_pass, "settle"),
)
REST = "everything else"


@contextmanager
def timed() -> Iterator[dict[str, float]]:
    """Seconds of each part within the context, filled in when it ends. What runs within the finer pass counts there."""
    spent: dict[str, float] = defaultdict(float)
    running: list[tuple[str, float]] = []
    finer = PARTS[3][0]

    def wrapped(name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if running and running[0][0] == finer:
                return plain(*args, **kwargs)
            now = time.perf_counter()
            if running:
                spent[running[-1][0]] += now - running[-1][1]
            running.append((name, now))
            try:
                return plain(*args, **kwargs)
            finally:
                now = time.perf_counter()
                spent[name] += now - running.pop()[1]
                if running:
                    running[-1] = (running[-1][0], now)

        return run

    started = time.perf_counter()
    with ExitStack() as undo:
        for name, owner, attribute in PARTS:
            undo.enter_context(patch.object(owner, attribute, wrapped(name, getattr(owner, attribute))))
        yield spent
    spent[REST] = time.perf_counter() - started - sum(spent.values())


assert doubts.settle is first_pass.settle  # what is patched is what runs
