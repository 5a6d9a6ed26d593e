"""The Pareto front: configurations of which none is both smaller and better than another."""

from collections.abc import Callable, Iterable

from dtm_fast.errors import InputError
from dtm_fast.plan.plan import Point

# What a point is judged by: larger is better.
QUALITIES: dict[str, Callable[[Point], float | None]] = {
    "fdt75": lambda point: point.fdt75,
    "fdt": lambda point: point.fdt,
    "sdt": lambda point: None if point.sdt is None else -point.sdt,
    "dppl": lambda point: None if point.dppl is None else -point.dppl,
}


def front(points: Iterable[Point], by: str = "fdt") -> list[Point]:
    """The points that no other one equals or beats in both size and quality, the smallest first.

    Args:
        points: any; those without the quality are left out. Of points that are equal in both, the first is kept.
        by: a name of ``QUALITIES``; ``"fdt75"`` is decided by mean FDT where it is equal.

    Raises:
        InputError: there is no such quality.
    """
    if by not in QUALITIES:
        raise InputError(f"no quality {by!r}; known: {', '.join(QUALITIES)}")
    quality = QUALITIES[by]
    kept: list[Point] = []
    known = [(point, found) for point in points if (found := quality(point)) is not None]
    best: tuple[float, float] | None = None
    for point, found in sorted(known, key=lambda each: (each[0].bits, -each[1], -each[0].fdt)):
        reached = (found, point.fdt if by == "fdt75" else 0.0)
        if best is None or reached > best:
            kept.append(point)
            best = reached
    return kept
