"""How much sparsity each component takes so that the worst-hit one is hit least: max-min by water-filling."""

import math
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass

from dtm_fast.errors import InputError

_ROUNDING = 1e-12
"""By how much, relative to the budget, sums of floats may miss it."""


@dataclass(frozen=True)
class Curve:
    """What adding sparsity to one component does: measured points, made never to rise, with straight lines between.

    A point that lies above one with less sparsity gets that one's value (the running minimum). So a curve promises no
    more at a sparsity than was measured at any lower one: a quality that rises with sparsity rises mostly by chance,
    and whoever counts on the higher point counts on what the lower one contradicts.

    Attributes:
        points: added sparsity and FDT_75 (or another quality: more is better), at least one point; in any order. Kept
            sorted and monotone.

    Raises:
        InputError: there is no point, two have the same sparsity, or a number is not finite.

    Source: Deiseroth et al. 2023 (papers.md §1.5) for the lines between the points; how to read a curve that rises is
        not known from there.
    """

    points: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        """Sorts the points and takes the running minimum."""
        if not self.points:
            raise InputError("curve: at least one point")
        if not all(map(math.isfinite, (number for point in self.points for number in point))):
            raise InputError(f"curve: every number must be finite: {list(self.points)}")
        monotone: list[tuple[float, float]] = []
        for added, value in sorted(self.points):
            if monotone and monotone[-1][0] == added:
                raise InputError(f"curve: two points at {added:g}")
            monotone.append((added, min(value, monotone[-1][1]) if monotone else value))
        object.__setattr__(self, "points", tuple(monotone))

    @property
    def smallest(self) -> float:
        """The least sparsity that was measured."""
        return self.points[0][0]

    @property
    def largest(self) -> float:
        """The most sparsity that was measured."""
        return self.points[-1][0]

    def value_at(self, added: float) -> float:
        """The curve's value at a sparsity from ``smallest`` to ``largest``.

        Raises:
            InputError: it lies outside.
        """
        if not self.smallest <= added <= self.largest:
            raise InputError(f"curve: {added:g} lies outside {self.smallest:g} … {self.largest:g}")
        place = bisect_left(self.points, added, key=lambda point: point[0])
        right = self.points[place]
        if right[0] == added:
            return right[1]
        left = self.points[place - 1]
        return left[1] + (added - left[0]) / (right[0] - left[0]) * (right[1] - left[1])

    def largest_at(self, level: float) -> float:
        """The largest sparsity at which the curve is still at ``level`` or above; ``smallest`` where it never is."""
        below = bisect_left(self.points, True, key=lambda point: point[1] < level)
        if below == 0:
            return self.smallest
        return self.largest if below == len(self.points) else self._between(below, level)

    def smallest_at(self, level: float) -> float:
        """The smallest sparsity at which the curve is at ``level`` or below; ``largest`` where it never is."""
        down = bisect_left(self.points, True, key=lambda point: point[1] <= level)
        if down == 0:
            return self.smallest
        return self.largest if down == len(self.points) else self._between(down, level)

    def _between(self, place: int, level: float) -> float:
        """Where the line that ends in point ``place`` passes the level."""
        (begin, above), (end, below) = self.points[place - 1], self.points[place]
        return min(end, begin + (above - level) / (above - below) * (end - begin))


@dataclass(frozen=True)
class Allocation:
    """What ``allocate`` found.

    Attributes:
        sparsities: component → added sparsity, in the order of the curves.
        level: the least value that any curve has there; no allocation of the same mean has more.
    """

    sparsities: dict[str, float]
    level: float


def allocate(curves: Mapping[str, Curve], sizes: Mapping[str, int], mean: float) -> Allocation:
    """The sparsities s_c of the largest ``min_c curve_c(s_c)`` with ``sum(size_c * s_c) / sum(size_c) == mean``.

    Water-filling: as the level sinks, each component may take more; where all together take the mean, the level is the
    optimum, for at any higher one they may not take as much. Between two levels at which some curve has a point every
    component's sparsity is linear in the level, so the optimum is found on that one line, exactly but for the rounding
    of floats.

    Where a curve is flat, its component may take more at no cost in level. If not all of that is needed, every
    component that is flat at the level takes the same share of its flat piece: the curves tell none of them from the
    others, and so the answer neither depends on their order nor jumps when the mean changes a little. A larger mean
    gives no component less.

    Args:
        curves: component → its curve; how much it can take is the curve's last point.
        sizes: component → how many parameters it has, for the same components.
        mean: of the added sparsities, weighted by size.

    Raises:
        InputError: no components, not the same ones, a size that is negative or not finite, no parameters at all, or a
            mean that cannot be reached; the message names the largest, or the smallest, that can.

    Source: Deiseroth et al. 2023 (papers.md §1.5).
    """
    _check(curves, sizes)
    total = math.fsum(sizes.values())
    levels = sorted({value for curve in curves.values() for _, value in curve.points}, reverse=True)

    def vertex(index: int) -> list[float]:
        # The way of all sparsities, as the level sinks, is straight from one of these to the next.
        level = levels[index // 2]
        if index % 2:
            return [curve.largest_at(level) for curve in curves.values()]
        return [curve.smallest_at(level) for curve in curves.values()]

    def weight(sparsities: list[float]) -> float:
        return math.fsum(sizes[path] * each for path, each in zip(curves, sparsities, strict=True))

    budget = _within(mean, weight(vertex(0)) / total, weight(vertex(2 * len(levels) - 1)) / total) * total
    place = bisect_left(range(2 * len(levels) - 1), budget, key=lambda index: weight(vertex(index)))
    before, after = vertex(max(0, place - 1)), vertex(place)
    least, most = weight(before), weight(after)
    share = min(1.0, (budget - least) / (most - least)) if most > least else 0.0
    found = [min(end, begin + share * (end - begin)) for begin, end in zip(before, after, strict=True)]
    level = min(curve.value_at(each) for curve, each in zip(curves.values(), found, strict=True))
    return Allocation(dict(zip(curves, found, strict=True)), level)


def _within(mean: float, smallest: float, largest: float) -> float:
    """The mean, moved into what is reachable if only rounding takes it out of that."""
    if not math.isfinite(mean):
        raise InputError(f"mean: must be a finite number, not {mean}")
    if mean > largest and not math.isclose(mean, largest, rel_tol=_ROUNDING):
        raise InputError(f"mean: {mean:g} cannot be reached; the largest that can is {largest:.13g}")
    if mean < smallest and not math.isclose(mean, smallest, rel_tol=_ROUNDING):
        raise InputError(f"mean: {mean:g} cannot be reached; the smallest that can is {smallest:.13g}")
    return min(max(mean, smallest), largest)


def _check(curves: Mapping[str, Curve], sizes: Mapping[str, int]) -> None:
    if not curves:
        raise InputError("curves: at least one component")
    for path in {**curves, **sizes}:
        if path not in curves or path not in sizes:
            raise InputError(f"{path}: a component needs both a curve and a size")
        if not (math.isfinite(sizes[path]) and sizes[path] >= 0):
            raise InputError(f"{path}: its size must be a number of parameters, not {sizes[path]}")
    if not any(sizes.values()):
        raise InputError("sizes: no parameters at all")
