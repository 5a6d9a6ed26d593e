"""Which option each unit takes so that all together fit a budget and harm least, if harms add."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from dtm_fast.errors import InputError


@dataclass(frozen=True)
class Option:
    """One way of keeping a unit: so many bits, so much harm; less is better of both."""

    bits: int
    harm: float


def choose(units: Sequence[Sequence[Option]], budget: int) -> list[int]:
    """The index of the option that each unit takes: at most ``budget`` bits in all, and little harm.

    The multiple-choice knapsack by the lower convex hull of each unit's options (Sinha and Zoltners 1979): from the
    least harmful option of each (the largest of them), the step that harms least for each bit that it saves is taken
    until all fit; what is left of the budget is then given back where that undoes most harm. It is the optimum where
    the steps use the budget up, and at most one step's harm above it elsewhere.

    Args:
        units: the options of each unit, at least one.
        budget: bits.

    Raises:
        InputError: not even the smallest options fit; the message names what they take.
    """
    smallest = sum(min(option.bits for option in options) for options in units)
    if smallest > budget:
        raise InputError(f"budget: {budget} bits, but the smallest that can be reached is {smallest}")
    hulls = [_hull(options) for options in units]
    chosen = [hull[0] for hull in hulls]
    total = sum(options[index].bits for options, index in zip(units, chosen, strict=True))
    steps = sorted(
        (_slope(options[before], options[after]), unit, place, after)
        for unit, (options, hull) in enumerate(zip(units, hulls, strict=True))
        for place, (before, after) in enumerate(pairwise(hull))
    )
    for _, unit, _, after in steps:
        if total <= budget:
            break
        total -= units[unit][chosen[unit]].bits - units[unit][after].bits
        chosen[unit] = after
    return _given_back(units, chosen, budget - total)


def _hull(options: Sequence[Option]) -> list[int]:
    """Indices on the lower convex hull of harm over bits, from the largest that nothing smaller beats, down.

    Of options that harm alike the larger stays, too: what looks harmless is made small only where the budget asks.
    """
    order = sorted(range(len(options)), key=lambda i: (-options[i].bits, options[i].harm, i))
    hull: list[int] = []
    for index in order:
        option = options[index]
        while hull and options[hull[-1]].harm > option.harm:
            hull.pop()
        if hull and options[hull[-1]].bits == option.bits:
            continue
        while len(hull) > 1 and _slope(options[hull[-2]], options[hull[-1]]) > _slope(
            options[hull[-1]], option
        ):
            hull.pop()
        hull.append(index)
    return hull


def _slope(before: Option, after: Option) -> float:
    """Harm for each bit saved."""
    return (after.harm - before.harm) / (before.bits - after.bits)


def _given_back(units: Sequence[Sequence[Option]], chosen: list[int], left: int) -> list[int]:
    """Less harmful options where the bits that are left allow them, the one that helps most first."""
    while True:
        gains = [
            (options[chosen[unit]].harm - option.harm, -unit, -index)
            for unit, options in enumerate(units)
            for index, option in enumerate(options)
            if option.harm < options[chosen[unit]].harm and option.bits - options[chosen[unit]].bits <= left
        ]
        if not gains:
            return chosen
        _, unit, index = max(gains)
        unit, index = -unit, -index
        left -= units[unit][index].bits - units[unit][chosen[unit]].bits
        chosen[unit] = index
