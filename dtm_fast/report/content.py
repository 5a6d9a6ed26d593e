"""What a report says, gathered from run.json, plan.json, the journal and what else is there; nothing is drawn here."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from dtm_fast.compression import Configuration, configuration_identity, configuration_to_json, effective_bits
from dtm_fast.errors import RunError
from dtm_fast.measure import EXTRA_METRICS, Measurement
from dtm_fast.measure.racing import standing
from dtm_fast.plan import RANKINGS, Plan, rank
from dtm_fast.plan.ranking import mean_of
from dtm_fast.report.comparison import Comparison
from dtm_fast.report.losses import Training, read_trainings
from dtm_fast.report.searches import Beam, InOrder, Joint, Rounds, Search, read_plan
from dtm_fast.report.setting import Setting
from dtm_fast.runs import RunDirectory


@dataclass(frozen=True)
class Sweep:
    """Components measured alone under one treatment.

    Attributes:
        treatment: the treatment's key.
        measured: component → its measurement, in depth order; fewer than the model has if unfinished. Components that
            are treated together (``plan.units``) have one measurement.
        ranked_by: what ``ranked`` goes by.
        ranked: the first component of each measurement, the least harmful first.
    """

    treatment: str
    measured: dict[str, Measurement]
    ranked_by: str
    ranked: list[str]

    @property
    def harmless(self) -> int:
        """How many components alone change no probe at all."""
        return sum(bool((m.fdt == m.completion).all()) for m in self.measured.values())

    @property
    def fused(self) -> bool:
        """Whether some components were measured together."""
        return len(self.ranked) < len(self.measured)


@dataclass(frozen=True)
class CurvePoint:
    """One joint configuration; ``fdt``, ``sdt`` and ``dppl`` are means over probes."""

    components: int
    share: float
    fdt75: float
    fdt: float
    fdt_interval: tuple[float, float]
    sdt: float
    dppl: float | None


@dataclass(frozen=True)
class Curve:
    """Growing joint configurations under one treatment, by size; ``chosen`` is the plan's own point."""

    treatment: str
    points: list[CurvePoint]
    chosen: CurvePoint | None


@dataclass(frozen=True)
class Dot:
    """One joint configuration by its size: effective bits and means over probes; None: not measured."""

    bits: float
    fdt: float
    sdt: float | None
    dppl: float | None


@dataclass(frozen=True)
class Content:
    """Everything a report says.

    Attributes:
        setting: how the run was run.
        sweeps: one per treatment, in the order in which the run began them.
        curves: one per treatment whose joint measurements grow, while no plan says otherwise.
        plan: what the search chose; None while it has not.
        search: how that search went; None without a plan, and for a search that is not known here.
        planned: the measurement of the plan's configuration; None where the journal has none.
        alone: component and treatment's key → the measurement of it alone, or of what is treated with it.
        dots: the joint configurations that were measured, for a joint search.
        comparison: what other criteria choose; None where it was not asked.
        trainings: recovery trainings.
        measurements: rows of the journal.
        seconds: spent measuring, all rows together.
    """

    setting: Setting
    sweeps: list[Sweep]
    curves: list[Curve]
    plan: Plan | None
    search: Search | None
    planned: Measurement | None
    alone: dict[tuple[str, str], Measurement]
    dots: list[Dot]
    comparison: Comparison | None
    trainings: list[Training]
    measurements: int
    seconds: float

    @property
    def planned_curve(self) -> Curve | None:
        """The curve of a plan in order."""
        if not isinstance(self.search, InOrder):
            return None
        treatment = self.search.treatment
        return next((curve for curve in self.curves if curve.treatment == treatment), None)

    @property
    def fdt_range(self) -> tuple[float, float]:
        """What the colours span: the lowest mean FDT of any component … N."""
        n = self.setting.completion
        means = [m.summary("fdt").mean for sweep in self.sweeps for m in sweep.measured.values()]
        # Where nothing diverges a span of zero would leave the scale undefined.
        return min([*means, n - 1]), n


def read_content(directory: RunDirectory) -> Content:
    """Gathers what ``directory`` holds, as far as the run got.

    Raises:
        InputError: if nothing was measured yet, or a file is not what it should be; the message names it.
    """
    setting = Setting.read(directory)
    plan, search = None, None
    if (directory.path / "plan.json").exists():
        plan, search = read_plan(directory.path / "plan.json", setting)
    journal = _Journal(directory, plan, search)
    merged = _merge(journal)
    for measurement in merged:
        for path in measurement.configuration:
            if path not in setting.components:
                raise RunError(f"{directory.path}: {path} was measured, but run.json does not list it")
    alone = _alone(merged)
    units = {id(m) for row in alone.values() for m in row.values()}
    joint = [m for m in merged if len(m.configuration) > 1 and id(m) not in units]
    sweeps = _sweeps(setting, alone, search)
    if not sweeps and not joint and plan is None:
        raise RunError(f"{directory.path}: nothing to report: no component has been measured yet")
    return Content(
        setting=setting,
        sweeps=sweeps,
        curves=_curves(setting, merged, joint, plan, search),
        plan=plan,
        search=search,
        planned=next((m for m in merged if plan is not None and m.configuration == plan.configuration), None),
        alone={(path, key): m for key, row in alone.items() for path, m in row.items()},
        dots=[_dot(setting, m) for m in joint] if isinstance(search, Joint) else [],
        comparison=Comparison.read(directory, setting),
        trainings=read_trainings(directory),
        measurements=journal.rows,
        seconds=journal.seconds,
    )


class _Journal:
    """The rows of a journal that a report needs; all are counted.

    A beam's extensions may be a hundred thousand, and its plan has their best; rows of FDT alone belong to races and
    refinements, of which only a joint search's front shows anything.
    """

    def __init__(self, directory: RunDirectory, plan: Plan | None, search: Search | None) -> None:
        self._directory = directory
        self._planned = None if plan is None else configuration_to_json(plan.configuration)
        self._search = search
        self.rows = 0
        self.seconds = 0.0

    def __iter__(self) -> Iterator[Measurement]:
        for row in self._directory.journal:
            self.rows += 1
            self.seconds += row["seconds"]
            if self._is_needed(row):
                yield Measurement.from_json(row)

    def _is_needed(self, row: Mapping[str, Any]) -> bool:
        stored = row["configuration"]
        if len(_modules(stored)) == 1 or stored == self._planned or isinstance(self._search, Joint):
            return True
        return "sdt" in row and not isinstance(self._search, (Rounds, Beam))


def _modules(paths: Iterable[str]) -> set[str]:
    """The attention or MLP modules that components are parts of."""
    return {path.rpartition(".")[0] for path in paths}


def _merge(rows: Iterable[Measurement]) -> list[Measurement]:
    """Each configuration once, with all metrics that any of its rows has."""
    merged: dict[str, Measurement] = {}
    for row in rows:
        identity = configuration_identity(row.configuration)
        if (known := merged.get(identity)) is not None:
            names = ("sdt", *EXTRA_METRICS)
            kept: dict[str, Any] = {
                name: getattr(known, name) for name in names if getattr(row, name) is None
            }
            row = replace(row, **kept)
        merged[identity] = row
    return list(merged.values())


def _alone(merged: Sequence[Measurement]) -> dict[str, dict[str, Measurement]]:
    """Treatment → component → the measurement of it alone, or of what a search treats with it.

    What is treated together lies in one module and was never measured in parts.
    """
    found: dict[str, dict[str, Measurement]] = {}
    for measurement in sorted(merged, key=lambda each: len(each.configuration)):
        paths = measurement.configuration
        keys = {treatment.key for treatment in paths.values()}
        if len(keys) != 1 or len(_modules(paths)) != 1:
            continue
        row = found.setdefault(keys.pop(), {})
        if not any(path in row for path in paths):
            row |= dict.fromkeys(paths, measurement)
    return found


def _sweeps(
    setting: Setting, alone: Mapping[str, Mapping[str, Measurement]], search: Search | None
) -> list[Sweep]:
    sweeps = []
    for key, found in alone.items():
        measured = {path: found[path] for path in setting.components if path in found}
        if len(measured) < len(setting.components):
            # A race and a round measure FDT alone, and not every component under the same treatment.
            measured = {path: m for path, m in measured.items() if m.sdt is not None}
        if not measured:
            continue
        # Of components that were measured together the first in depth order stands for all.
        firsts = {id(m): path for path, m in reversed(measured.items())}
        units = {path: measured[path] for path in firsts.values()}
        by = search.ranked_by if isinstance(search, InOrder) and search.treatment == key else "fdt75"
        needed = RANKINGS.get(by)
        if by not in RANKINGS or any(needed and getattr(m, needed) is None for m in units.values()):
            by = "fdt75"
        sweeps.append(Sweep(key, measured, by, _ranked(units, by)))
    return sweeps


def _ranked(measured: Mapping[str, Measurement], by: str) -> list[str]:
    if all(m.sdt is not None for m in measured.values()):
        return rank(measured, by)
    # As rank, but for SDT, which decides last.
    places = {path: [-each for each in standing(m.fdt)] for path, m in measured.items()}
    return sorted(measured, key=lambda path: (places[path], path))


def _curves(
    setting: Setting,
    merged: Iterable[Measurement],
    joint: Sequence[Measurement],
    plan: Plan | None,
    search: Search | None,
) -> list[Curve]:
    if plan is not None and not isinstance(search, InOrder):
        return []
    curves = []
    growing = _growing(joint)
    if isinstance(search, InOrder) and plan is not None:
        # A plan's smallest steps may be single components; other joint rows are an earlier plan's.
        sizes = {point.components for point in plan.curve}
        own = [m for m in merged if m.sdt is not None and _is_of(m.configuration, search, sizes)]
        growing = {**growing, search.treatment: own}
    for key, measurements in growing.items():
        found = [(m, _point(setting, m)) for m in measurements]
        found.sort(key=lambda each: (each[1].share, each[1].components))
        chosen = [point for m, point in found if plan and plan.configuration == m.configuration]
        if found:
            curves.append(Curve(key, [point for _, point in found], chosen[0] if chosen else None))
    return curves


def _growing(joint: Iterable[Measurement]) -> dict[str, list[Measurement]]:
    """Treatment → its joint measurements, where each treats all that the one before did and more."""
    found: dict[str, list[Measurement]] = {}
    for measurement in joint:
        keys = {treatment.key for treatment in measurement.configuration.values()}
        if len(keys) == 1 and measurement.sdt is not None:
            found.setdefault(keys.pop(), []).append(measurement)
    for measurements in found.values():
        measurements.sort(key=lambda each: len(each.configuration))
    return {
        key: measurements
        for key, measurements in found.items()
        if all(a.configuration.keys() < b.configuration.keys() for a, b in pairwise(measurements))
    }


def _is_of(configuration: Configuration, search: InOrder, sizes: set[int]) -> bool:
    size = len(configuration)
    return (
        size in sizes
        and {treatment.key for treatment in configuration.values()} == {search.treatment}
        and configuration.keys() == set(search.order[:size])
    )


def _point(setting: Setting, measurement: Measurement) -> CurvePoint:
    fdt = measurement.summary("fdt")
    return CurvePoint(
        components=len(measurement.configuration),
        share=sum(setting.components[path].numel for path in measurement.configuration) / setting.weights,
        fdt75=fdt.p75,
        fdt=fdt.mean,
        fdt_interval=fdt.mean_interval,
        sdt=measurement.summary("sdt").mean,
        dppl=measurement.summary("dppl").mean if measurement.dppl is not None else None,
    )


def _dot(setting: Setting, measurement: Measurement) -> Dot:
    return Dot(
        bits=effective_bits(setting.shapes, measurement.configuration),
        fdt=mean_of(measurement, "fdt"),
        sdt=None if measurement.sdt is None else mean_of(measurement, "sdt"),
        dppl=None if measurement.dppl is None else mean_of(measurement, "dppl"),
    )
