"""How each search says that it went: a plan's ``how``, typed and checked."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from dtm_fast.errors import InputError
from dtm_fast.plan import Plan, Point, beam, in_order, joint, pruning_rounds
from dtm_fast.report.setting import Setting
from dtm_fast.report.stored import entries, finite, number, reading, share, text, whole


@dataclass(frozen=True)
class InOrder:
    """Components converted in order of harm; what stopped it is None where it was not asked for."""

    treatment: str
    ranked_by: str
    order: list[str]
    components: int | None
    share: float | None
    min_fdt: float | None


@dataclass(frozen=True)
class Rounds:
    """Pruning in rounds.

    Attributes:
        steps: what each round added to the mean sparsity.
        levels: of each round the least FDT_75 that any component's curve has at what it got.
        sparsities: component → its sparsity, after each round.
        uniform: what the same mean sparsity does uniformly, after each round; empty where that was not measured.
    """

    steps: list[float]
    levels: list[float]
    sparsities: list[dict[str, float]]
    uniform: list[Point]

    def mean_sparsities(self, setting: Setting) -> list[float]:
        """The share of all components' weights that is dropped after each round."""
        return [
            sum(sparsity * setting.components[path].numel for path, sparsity in after.items())
            / setting.weights
            for after in self.sparsities
        ]


@dataclass(frozen=True)
class Beam:
    """The beam search; ``units`` is their number, ``among`` None where each depth looked at all."""

    treatments: list[str]
    width: int
    by: str
    among: int | None
    units: int


@dataclass(frozen=True)
class Joint:
    """The joint search; ``reached`` has a point for each of ``budgets`` (effective bits), ``units`` is their number.

    ``confirmed_on`` other probes decided and are what the points are of; None: there were none.
    """

    treatments: list[str]
    budgets: list[float]
    units: int
    refinements: int
    confirmed_on: int | None
    reached: list[Point]


Search: TypeAlias = InOrder | Rounds | Beam | Joint


def read_plan(path: Path, setting: Setting) -> tuple[Plan, Search | None]:
    """The plan at ``path`` and how its search went; None for a search that is not known here.

    Raises:
        InputError: it cannot be read, is no plan, or not of this run's components; the message names the file.
    """
    plan = Plan.read(path)
    with reading(path, "a plan"):
        for component in plan.configuration:
            _known(component, setting)
        for point in (*plan.curve, *([plan.chosen] if plan.chosen else [])):
            _check_point(point)
        found = _search(plan, setting)
        if plan.configuration and plan.chosen is None:
            raise InputError("it is not empty, but has no point of its own")
    return plan, found


def _search(plan: Plan, setting: Setting) -> Search | None:
    how = plan.how
    if plan.search == in_order.SEARCH:
        stop = how["stop"]
        return InOrder(
            treatment=text(how["treatment"]),
            ranked_by=text(how["ranked_by"]),
            order=[_known(path, setting) for path in entries(how["order"])],
            components=None if stop["components"] is None else whole(stop["components"]),
            share=None if stop["share"] is None else finite(stop["share"]),
            min_fdt=None if stop["min_fdt"] is None else finite(stop["min_fdt"]),
        )
    if plan.search == pruning_rounds.SEARCH:
        rounds = entries(how["rounds"])
        if len(rounds) != len(plan.curve) or not rounds:
            raise InputError(f"{len(rounds)} rounds, but {len(plan.curve)} points")
        uniform = [Point.from_json(point) for point in entries(how.get("uniform", []))]
        for point in uniform:
            _check_point(point)
        if uniform and len(uniform) != len(rounds):
            raise InputError(f"{len(rounds)} rounds, but {len(uniform)} uniform points")
        return Rounds(
            steps=[finite(each["step"]) for each in rounds],
            levels=[finite(each["level"]) for each in rounds],
            sparsities=[_sparsities(each["sparsities"], setting) for each in rounds],
            uniform=uniform,
        )
    if plan.search == beam.SEARCH:
        return Beam(
            treatments=list(map(text, entries(how["treatments"]))),
            width=whole(how["width"], least=1),
            by=text(how["by"]),
            among=None if how["among"] is None else whole(how["among"], least=1),
            units=len(entries(how["units"])),
        )
    if plan.search == joint.SEARCH:
        reached = [Point.from_json(point) for point in entries(how["reached"])]
        for point in reached:
            _check_point(point)
        budgets = list(map(finite, entries(how["budgets"])))
        if len(budgets) != len(reached) or not budgets:
            raise InputError(f"{len(budgets)} budgets, but {len(reached)} points for them")
        return Joint(
            treatments=list(map(text, entries(how["treatments"]))),
            budgets=budgets,
            units=whole(how["units"]),
            refinements=whole(how["refinements"]),
            confirmed_on=None if how["confirmed_on"] is None else whole(how["confirmed_on"], least=1),
            reached=reached,
        )
    return None


def _known(path: Any, setting: Setting) -> str:
    if path not in setting.components:
        raise InputError(f"{path!r} is none of the components in run.json")
    return text(path)


def _sparsities(stored: Mapping[str, Any], setting: Setting) -> dict[str, float]:
    return {_known(path, setting): share(sparsity) for path, sparsity in stored.items()}


def _check_point(point: Point) -> None:
    whole(point.components)
    always, where_measured = (point.share, point.bits, point.fdt75, point.fdt), (point.sdt, point.dppl)
    for value in (*always, *(each for each in where_measured if each is not None)):
        number(value)
