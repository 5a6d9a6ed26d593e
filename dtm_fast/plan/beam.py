"""The beam search: at each depth the best configurations of one more unit than those of the depth before."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from dtm_fast.compression import Configuration, Name, Treatment, check_configuration, name_of, parse_treatment
from dtm_fast.errors import InputError
from dtm_fast.measure import Evaluator, Measurement
from dtm_fast.measure.racing import place, standing
from dtm_fast.model import Decoder
from dtm_fast.plan.in_order import metrics_for
from dtm_fast.plan.plan import Plan, Point
from dtm_fast.plan.ranking import mean_of
from dtm_fast.plan.recorded import RecordedEvaluator
from dtm_fast.plan.units import Unit
from dtm_fast.plan.units import units as units_of

SEARCH = "beam"
METRICS = ("dppl", "sdt")
OnDepth = Callable[[int, Point], None]


def beam_search(
    recorded: RecordedEvaluator,
    treatments: Sequence[Treatment],
    depth: int,
    *,
    width: int = 10,
    by: str = "fdt75",
    units: Sequence[Unit] | None = None,
    among: int | None = None,
    on_depth: OnDepth = lambda depth, point: None,
) -> Plan:
    """Treats one unit after the other, the ``width`` best configurations at a time.

    At each depth every kept configuration is extended by each of its untreated units under each of the treatments; of
    what several extend to, only one is measured; the ``width`` best of all extensions are kept, of equals the lower
    names. A width of 1 is the greedy search. Equals measuring all of them, sorting them and keeping the first.

    By ``"fdt75"`` FDT_75 decides and, where that is equal, mean FDT: FDT_75 is N for most of the first depths. Where
    the evaluator can, each kept configuration's extensions are raced from its states against the best of the depth so
    far, and nothing hopeless is read to its end. The other metrics are means, which are measured completely.

    What a depth has decided is noted in the journal, after each raced parent. A search that is resumed takes it from
    there, also one that goes deeper than it did, and measures nothing twice.

    Args:
        recorded: measures.
        treatments: of which each extension gets one.
        depth: how many units to treat.
        width: how many configurations each depth keeps.
        by: a name of ``RANKINGS``.
        units: what is treated together (``plan.units``); by default every component is a unit.
        among: extend each kept configuration by at most so many of its untreated units, the least harmful alone first,
            where a unit's harm is that of the treatment that harms it least. This is our economy and not the paper's:
            a unit that is harmful alone and not beside others is then not found. None for all of them, as the paper.
        on_depth: called with the number of each depth and its best, once it is decided or known.

    Returns:
        A plan whose curve has the best of each depth, measured completely, the last of which is chosen; what else each
        depth kept is in ``how`` (``kept_by``).

    Raises:
        InputError: no treatment, a depth, width or among that cannot be meant, no such ranking, or a component that is
            in two units.
        ComponentError, TreatmentError: a treatment does not fit a component.

    Source: Deiseroth et al. 2023 (papers.md §1.7); width 10, and one treatment there.
    """
    chosen = units_of(recorded.decoder) if units is None else [tuple(unit) for unit in units]
    _check(recorded.decoder, treatments, chosen, depth, width, by, among)
    keys = list(dict.fromkeys(treatment.key for treatment in treatments))
    beam = _Beam(recorded, keys, chosen, width, by, among)
    parents: list[Configuration] = [{}]
    kept: list[list[_Step]] = []
    curve: list[Point] = []
    for number in range(1, depth + 1):
        kept.append(beam.depth(number, parents))
        parents = _extended(parents, kept[-1], chosen)
        (best,) = recorded.measure(parents[:1], METRICS)
        curve.append(Point.of(recorded.decoder, best))
        on_depth(number, curve[-1])
    return Plan(
        configuration=dict(parents[0]),
        search=SEARCH,
        how={
            "treatments": keys,
            "depth": depth,
            "width": width,
            "by": by,
            "among": among,
            "units": [list(unit) for unit in chosen],
            "kept": [[step.to_json() for step in steps] for steps in kept],
        },
        model=recorded.model_identity,
        calibration=recorded.decoder.calibration,
        curve=curve,
        chosen=curve[-1],
    )


def kept_by(plan: Plan) -> list[list[Configuration]]:
    """The configurations that each depth of a beam plan kept, the best first."""
    units = [tuple(unit) for unit in plan.how["units"]]
    found: list[list[Configuration]] = [[{}]]
    for steps in plan.how["kept"]:
        found.append(_extended(found[-1], [_Step(*step) for step in steps], units))
    return found[1:]


@dataclass(frozen=True)
class _Step:
    """How a configuration came from one that the depth before kept.

    Attributes:
        parent: the index of that one; the first depth's is the model as it is.
        unit: what was added, by its first component.
        treatment: the key of what it got.
    """

    parent: int
    unit: str
    treatment: str

    def to_json(self) -> list[Any]:
        """Its attributes."""
        return [self.parent, self.unit, self.treatment]


def _extended(
    parents: Sequence[Configuration], steps: Iterable[_Step], units: Iterable[Unit]
) -> list[Configuration]:
    """The configurations to which steps lead, their components in the order in which they were treated."""
    whole = {unit[0]: unit for unit in units}
    return [
        {**parents[step.parent], **dict.fromkeys(whole[step.unit], parse_treatment(step.treatment))}
        for step in steps
    ]


class _Beam:
    """Decides one depth after the other."""

    def __init__(
        self,
        recorded: RecordedEvaluator,
        treatments: Sequence[str],
        units: Sequence[Unit],
        width: int,
        by: str,
        among: int | None,
    ) -> None:
        self._recorded = recorded
        self._journal = recorded.journal  # decisions stand where the measurements do that they were made by
        self._treatments = treatments
        self._units = units
        self._width = width
        self._by = by
        self._among = among
        self._metrics = () if by == "fdt75" else metrics_for(by)
        self._races = (
            by == "fdt75" and isinstance(recorded.evaluator, Evaluator) and recorded.evaluator.can_race
        )
        self._step = recorded
        arguments = {
            "among": among,
            "by": by,
            "treatments": sorted(treatments),
            "units": hashlib.sha256(json.dumps(sorted(units)).encode()).hexdigest(),
            "width": width,
        }
        self._name = f"{SEARCH} {json.dumps(arguments)}"

    def depth(self, number: int, parents: Sequence[Configuration]) -> list[_Step]:
        """What the depth keeps of what extends ``parents``, the best first."""
        name = f"{self._name} depth {number}"
        known = self._journal.noted(name) or {"extended": 0, "kept": []}
        kept = [_Step(*step) for step in known["kept"]]
        if known["extended"] == len(parents):
            return kept
        steps = self._steps(parents)
        every = [step for own in steps for step in own]
        step_of = dict(zip(map(name_of, _extended(parents, every, self._units)), every, strict=True))

        def decided(count: int, best: Iterable[Measurement]) -> list[_Step]:
            kept = [step_of[name_of(each.configuration)] for each in best]
            self._journal.note(name, {"extended": count, "kept": [step.to_json() for step in kept]})
            return kept

        if not self._races:
            measured = self._recorded.measure(_extended(parents, every, self._units), self._metrics)
            return decided(len(parents), sorted(measured, key=self._place)[: self._width])
        for index in range(known["extended"], len(parents)):
            candidates = _extended(parents, [*kept, *steps[index]], self._units)
            here = self._from(parents[index]) if steps[index] else self._recorded
            race = here.best(candidates, self._width, by="fdt75+mean")
            kept = decided(index + 1, race.best)
        return kept

    def _steps(self, parents: Sequence[Configuration]) -> list[list[_Step]]:
        """Those of each parent, but what an earlier one extends to as well, the least harmful alone first."""
        seen: set[Name] = set()
        found: list[list[_Step]] = []
        for index, parent in enumerate(parents):
            untreated = [(unit, treatment) for unit, treatment in self._by_harm if unit not in parent]
            near = set(list(dict.fromkeys(unit for unit, _ in untreated))[: self._among])
            steps = [_Step(index, unit, treatment) for unit, treatment in untreated if unit in near]
            names = list(map(name_of, _extended(parents, steps, self._units)))
            found.append([step for step, name in zip(steps, names, strict=True) if name not in seen])
            seen.update(names)
        return found

    @cached_property
    def _by_harm(self) -> list[tuple[str, str]]:
        """Every unit, by its first component, under every treatment, the least harmful alone first.

        All of them are measured to their end: they are the first depth's extensions, and who is read first in a race of
        a later one makes it short.
        """
        moves = [(unit[0], treatment) for unit in self._units for treatment in self._treatments]
        alone = _extended([{}], [_Step(0, *move) for move in moves], self._units)
        measured = self._recorded.measure(alone, self._metrics)
        places = dict(zip(moves, map(self._place, measured), strict=True))
        return sorted(moves, key=places.__getitem__)

    def _place(self, measurement: Measurement) -> tuple[tuple[float, ...], Name]:
        """What decides, the best first."""
        name = name_of(measurement.configuration)
        if self._by == "fdt75":
            return place(standing(measurement.fdt), name, "fdt75+mean")
        return (mean_of(measurement, self._by),), name

    def _from(self, parent: Configuration) -> RecordedEvaluator:
        """Measures from the parent's states, which take the place of those of the parent before."""
        if not parent:
            return self._recorded
        replaced = None if self._step is self._recorded else self._step
        self._step = self._recorded.rebased(parent, instead_of=replaced)
        return self._step


def _check(
    decoder: Decoder,
    treatments: Sequence[Treatment],
    units: Sequence[Unit],
    depth: int,
    width: int,
    by: str,
    among: int | None,
) -> None:
    metrics_for(by)
    if not treatments:
        raise InputError("treatments: at least one")
    paths = [path for unit in units for path in unit]
    for path, times in Counter(paths).items():
        if times > 1:
            raise InputError(f"units: {path} stands in {times} places")
    for treatment in treatments:
        check_configuration(decoder, dict.fromkeys(paths, treatment))
    if not all(units):
        raise InputError("units: one has no component")
    check_beam(depth, width, among, len(units))


def check_beam(depth: int, width: int, among: int | None, units: int | None = None) -> None:
    """Raises InputError unless a beam can have this shape; among so many units, if that is known."""
    if units is not None and not 1 <= depth <= units:
        raise InputError(f"depth: 1 … {units} (units), not {depth}")
    if depth < 1:
        raise InputError(f"depth: at least 1 unit to treat, not {depth}")
    if width < 1:
        raise InputError(f"width: at least 1 configuration to keep, not {width}")
    if among is not None and among < 1:
        raise InputError(f"among: at least 1 unit to look at, not {among}")
