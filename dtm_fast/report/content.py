"""What a report says, gathered from run.json, plan.json and the journal; nothing is drawn here."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from dtm_fast.compression import configuration_identity
from dtm_fast.errors import RunError
from dtm_fast.measure import EXTRA_METRICS, Floor, Measurement
from dtm_fast.plan import RANKINGS, Plan, in_order, rank
from dtm_fast.runs import RunDirectory


@dataclass(frozen=True)
class ListedComponent:
    """A component as run.json lists it: its path, layer, name inside the layer and number of parameters."""

    path: str
    layer: int
    name: str
    numel: int


@dataclass(frozen=True)
class Setting:
    """How the run was run: run.json, typed."""

    command: list[str]
    started: str
    model: str
    model_type: str
    dtype: str
    parameters: int
    text: str
    probes: int
    prefix: int
    completion: int
    floor: Floor
    components: dict[str, ListedComponent]
    machine: dict[str, Any]
    versions: dict[str, Any]

    @property
    def layers(self) -> list[int]:
        """The layers that have components, in order."""
        return sorted({component.layer for component in self.components.values()})

    @property
    def names(self) -> list[str]:
        """The components' names inside their layers, in module order, each once."""
        names: list[str] = []
        place, layer = 0, -1
        for component in self.components.values():
            # Where layers differ, what an earlier layer lacks goes beside its neighbour in its own layer.
            place, layer = (place, layer) if component.layer == layer else (0, component.layer)
            if component.name not in names:
                names.insert(place, component.name)
            place = names.index(component.name) + 1
        return names


@dataclass(frozen=True)
class Sweep:
    """Components measured alone under one treatment.

    Attributes:
        treatment: the treatment's key.
        measured: component → its measurement, in depth order; fewer than the model has if unfinished.
        ranked_by: what ``ranked`` goes by.
        ranked: the measured components, the least harmful first.
    """

    treatment: str
    measured: dict[str, Measurement]
    ranked_by: str
    ranked: list[str]

    @property
    def harmless(self) -> int:
        """How many components alone change no probe at all."""
        return sum(bool((m.fdt == m.completion).all()) for m in self.measured.values())


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
    """Joint configurations under one treatment, by size; ``chosen`` is the plan's own point."""

    treatment: str
    points: list[CurvePoint]
    chosen: CurvePoint | None


@dataclass(frozen=True)
class Content:
    """Everything a report says.

    Attributes:
        setting: how the run was run.
        sweeps: one per treatment, in the order in which the run began them.
        curves: one per treatment with joint measurements.
        plan: what the search chose; None while it has not.
        measurements: rows of the journal.
        seconds: spent measuring, all rows together.
    """

    setting: Setting
    sweeps: list[Sweep]
    curves: list[Curve]
    plan: Plan | None
    measurements: int
    seconds: float

    @property
    def planned(self) -> Curve | None:
        """The plan's curve."""
        if self.plan is None:
            return None
        return next((curve for curve in self.curves if curve.treatment == _treatment_of(self.plan)), None)

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
        RunError: if nothing was measured yet, or run.json or plan.json is not what it should be.
    """
    # A race measures FDT alone, and not of all: its rows are not among those of a sweep.
    rows = [Measurement.from_json(row) for row in directory.journal if "sdt" in row]
    stored = directory.read_json("run.json")
    if stored is None:
        raise RunError(f"{directory.path}: nothing to report: there is no run.json")
    setting = _setting(directory, stored)
    merged = _merge(rows)
    alone = [m for m in merged if len(m.configuration) == 1]
    joint = [m for m in merged if len(m.configuration) > 1]
    if not alone and not joint:
        raise RunError(f"{directory.path}: nothing to report: no component has been measured yet")
    for measurement in (*alone, *joint):
        for path in measurement.configuration:
            if path not in setting.components:
                raise RunError(f"{directory.path}: {path} was measured, but run.json does not list it")
    stored_plan = directory.read_json("plan.json")
    plan = Plan.from_json(stored_plan) if stored_plan is not None else None
    return Content(
        setting=setting,
        sweeps=_sweeps(setting, alone, plan),
        curves=_curves(setting, merged, plan),
        plan=plan,
        measurements=len(rows),
        seconds=sum(m.seconds for m in rows),
    )


def _setting(directory: RunDirectory, stored: Mapping[str, Any]) -> Setting:
    try:
        model, probes = stored["model"], stored["probes"]
        return Setting(
            command=list(stored["command"]),
            started=stored["started"],
            model=model["name"],
            model_type=model["type"],
            dtype=model["dtype"],
            parameters=model["parameters"],
            text=probes["text"],
            probes=probes["count"],
            prefix=probes["prefix"],
            completion=probes["completion"],
            floor=Floor(**stored["floor"]),
            components={c["path"]: ListedComponent(**c) for c in stored["components"]},
            machine=dict(stored["machine"]),
            versions=dict(stored["versions"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(f"{directory.path / 'run.json'}: not of a run of dtm_fast: {error!r}") from error


def _treatment_of(plan: Plan) -> str | None:
    """The treatment of a plan that converts components in order; the others' are many."""
    return str(plan.how["treatment"]) if plan.search == in_order.SEARCH else None


def _merge(rows: Iterable[Measurement]) -> list[Measurement]:
    """Each configuration once, with all metrics that any of its rows has."""
    merged: dict[str, Measurement] = {}
    for row in rows:
        identity = configuration_identity(row.configuration)
        if (known := merged.get(identity)) is not None:
            kept = {name: getattr(known, name) for name in EXTRA_METRICS if getattr(row, name) is None}
            row = replace(row, **kept)
        merged[identity] = row
    return list(merged.values())


def _sweeps(setting: Setting, alone: Iterable[Measurement], plan: Plan | None) -> list[Sweep]:
    found: dict[str, dict[str, Measurement]] = {}
    for measurement in alone:
        ((path, treatment),) = measurement.configuration.items()
        found.setdefault(treatment.key, {})[path] = measurement
    sweeps = []
    for treatment_key, unordered in found.items():
        measured = {path: unordered[path] for path in setting.components if path in unordered}
        by = "fdt75"
        if plan is not None and _treatment_of(plan) == treatment_key:
            by = plan.how["ranked_by"]
        needed = RANKINGS.get(by)
        if by not in RANKINGS or any(needed and getattr(m, needed) is None for m in measured.values()):
            by = "fdt75"
        sweeps.append(Sweep(treatment_key, measured, by, rank(measured, by)))
    return sweeps


def _curves(setting: Setting, merged: Iterable[Measurement], plan: Plan | None) -> list[Curve]:
    total = sum(component.numel for component in setting.components.values())
    found: dict[str, list[CurvePoint]] = {}
    chosen = None
    for measurement in merged:
        paths = list(measurement.configuration)
        keys = {treatment.key for treatment in measurement.configuration.values()}
        if len(keys) != 1:
            continue
        (key,) = keys
        if plan is not None and key == _treatment_of(plan):
            # A plan's smallest steps may be single components; other joint rows are an earlier plan's.
            sizes = {point.components for point in plan.curve}
            if len(paths) not in sizes or set(paths) != set(plan.how["order"][: len(paths)]):
                continue
        elif len(paths) == 1:
            continue
        point = _point(measurement, sum(setting.components[path].numel for path in paths) / total)
        found.setdefault(key, []).append(point)
        if plan is not None and plan.configuration and measurement.configuration == plan.configuration:
            chosen = point
    return [
        Curve(
            treatment=key,
            points=sorted(points, key=lambda point: (point.share, point.components)),
            chosen=chosen if plan is not None and key == _treatment_of(plan) else None,
        )
        for key, points in found.items()
    ]


def _point(measurement: Measurement, share: float) -> CurvePoint:
    fdt = measurement.summary("fdt")
    return CurvePoint(
        components=len(measurement.configuration),
        share=share,
        fdt75=fdt.p75,
        fdt=fdt.mean,
        fdt_interval=fdt.mean_interval,
        sdt=measurement.summary("sdt").mean,
        dppl=measurement.summary("dppl").mean if measurement.dppl is not None else None,
    )
