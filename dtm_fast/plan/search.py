"""The sweep of every component alone, and the plan that converts them in order of harm."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from dtm_fast.compression import Treatment, configuration_from_json, configuration_to_json
from dtm_fast.errors import InputError
from dtm_fast.measure import Measurement
from dtm_fast.model import Decoder
from dtm_fast.plan.ranking import RANKINGS, rank
from dtm_fast.plan.recorded import RecordedEvaluator

_FORMAT = 1


@dataclass(frozen=True)
class Stop:
    """When to convert no further component; the first that applies.

    Attributes:
        components: at most so many components.
        share: at most this share of the parameters of all components, 0 … 1.
        min_fdt: the joint configuration's FDT_75 must not be lower, in tokens.
    """

    components: int | None = None
    share: float | None = None
    min_fdt: float | None = None

    def check(self, completion: int) -> None:
        """Raises InputError for a stop that cannot be meant."""
        if self.components is not None and self.components < 1:
            raise InputError(f"stop: at least 1 component, not {self.components}")
        if self.share is not None and not 0 < self.share <= 1:
            raise InputError(f"stop: share must lie in (0, 1], not {self.share}")
        if self.min_fdt is not None and not 0 <= self.min_fdt <= completion:
            raise InputError(
                f"stop: min_fdt must lie in 0 … {completion} (the completion), not {self.min_fdt}"
            )


@dataclass(frozen=True)
class Point:
    """One joint configuration on the way: how much was converted and what that did (means over probes)."""

    components: int
    share: float
    fdt75: float
    fdt: float
    sdt: float
    dppl: float | None


@dataclass(frozen=True)
class Plan:
    """The configuration that a search chose, with how it was found and what it measured.

    Attributes:
        configuration: component → treatment.
        treatment: the one treatment of all.
        ranked_by: what ordered the components.
        order: all components, the least harmful alone first.
        stop: the stop that was asked for.
        curve: the joint configurations measured, by size.
        chosen: the plan's own point on the curve; None for an empty plan.
    """

    configuration: dict[str, Treatment]
    treatment: Treatment
    ranked_by: str
    order: list[str]
    stop: Stop
    curve: list[Point] = field(default_factory=list)
    chosen: Point | None = None

    def to_json(self) -> dict[str, Any]:
        """The content of ``plan.json``."""
        return {
            "format": _FORMAT,
            "configuration": configuration_to_json(self.configuration),
            "treatment": self.treatment.key,
            "ranked_by": self.ranked_by,
            "order": self.order,
            "stop": asdict(self.stop),
            "curve": [asdict(point) for point in self.curve],
            "chosen": asdict(self.chosen) if self.chosen else None,
        }

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> "Plan":
        """The inverse of ``to_json``; InputError if it is none."""
        try:
            if stored["format"] != _FORMAT:
                raise InputError(f"plan: format {stored['format']}, this dtm_fast reads {_FORMAT}")
            configuration = configuration_from_json(stored["configuration"])
            (treatment,) = configuration_from_json({"": stored["treatment"]}).values()
            return cls(
                configuration=configuration,
                treatment=treatment,
                ranked_by=stored["ranked_by"],
                order=list(stored["order"]),
                stop=Stop(**stored["stop"]),
                curve=[Point(**point) for point in stored["curve"]],
                chosen=Point(**stored["chosen"]) if stored["chosen"] else None,
            )
        except (AttributeError, KeyError, TypeError) as error:
            raise InputError(f"plan: not a plan of dtm_fast: {error!r}") from error


def metrics_for(ranked_by: str, prefix: int | None = None) -> list[str]:
    """What a sweep must measure beyond FDT: SDT and DPPL always, and what the ranking needs.

    Args:
        ranked_by: a name of ``RANKINGS``.
        prefix: n of the probes, where the ranking is to be checked against it.

    Raises:
        InputError: if there is no such ranking, or not for such probes.
    """
    if ranked_by not in RANKINGS:
        raise InputError(f"no ranking {ranked_by!r}; known: {', '.join(RANKINGS)}")
    needed = RANKINGS[ranked_by]
    if needed == "perplexity" and prefix == 1:
        raise InputError("ranking by perplexity needs prefixes of at least 2 tokens, not 1")
    return sorted({"sdt", "dppl"} | ({needed} if needed else set()))


def check_every(every: int) -> None:
    """Raises InputError unless ``every`` is a number of components to measure after."""
    if every < 1:
        raise InputError(f"every: at least 1 component between two measurements, not {every}")


def sweep(
    recorded: RecordedEvaluator, treatment: Treatment, metrics: Sequence[str] = ("dppl",)
) -> dict[str, Measurement]:
    """Measures every component alone under ``treatment``; component → measurement, in depth order."""
    paths = list(recorded.decoder.components)
    measured = recorded.measure([{path: treatment} for path in paths], metrics)
    return dict(zip(paths, measured, strict=True))


def plan_in_order(
    recorded: RecordedEvaluator,
    treatment: Treatment,
    ranked_by: str = "fdt75",
    stop: Stop = Stop(),
    every: int = 10,
) -> Plan:
    """Converts components in order of harm until ``stop``, measuring the joint configuration as it grows.

    The joint configuration is measured at every ``every`` components and at the stop. Where ``min_fdt`` ends
    it between two of those, the largest size that keeps it is found by bisection (as if FDT_75 only fell).

    Args:
        recorded: measures; the sweep is done first as far as it is not in the journal.
        treatment: of every converted component.
        ranked_by: a name of ``RANKINGS``.
        stop: when to end.
        every: components between two measurements of the joint configuration.

    Source: Deiseroth et al. 2023 (papers.md §1.7), its beam search at width 1 with the order fixed beforehand.
    """
    metrics = metrics_for(ranked_by)
    check_every(every)
    order = rank(sweep(recorded, treatment, metrics), ranked_by)
    most = _most(recorded.decoder, order, stop)
    points: dict[int, Point] = {}

    def holds(size: int) -> bool:
        (joint,) = recorded.measure([dict.fromkeys(order[:size], treatment)], metrics)
        points[size] = _point(recorded.decoder, order[:size], joint)
        return stop.min_fdt is None or points[size].fdt75 >= stop.min_fdt

    good, bad = 0, most + 1
    for size in [*range(every, most, every), *([most] if most else [])]:
        if not holds(size):
            bad = size
            break
        good = size
    while bad - good > 1 and bad <= most:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if holds(middle) else (good, middle)
    return Plan(
        configuration=dict.fromkeys(order[:good], treatment),
        treatment=treatment,
        ranked_by=ranked_by,
        order=order,
        stop=stop,
        curve=[points[size] for size in sorted(points)],
        chosen=points.get(good),
    )


def _share(decoder: Decoder, paths: Sequence[str]) -> float:
    total = sum(component.numel for component in decoder.components.values())
    return sum(decoder.component(path).numel for path in paths) / total


def _most(decoder: Decoder, order: Sequence[str], stop: Stop) -> int:
    """How many components of ``order`` the number and the share of ``stop`` allow."""
    most = len(order) if stop.components is None else min(stop.components, len(order))
    if stop.share is not None:
        while most and _share(decoder, order[:most]) > stop.share:
            most -= 1
    return most


def _point(decoder: Decoder, paths: Sequence[str], joint: Measurement) -> Point:
    fdt = joint.summary("fdt")
    return Point(
        components=len(paths),
        share=_share(decoder, paths),
        fdt75=fdt.p75,
        fdt=fdt.mean,
        sdt=joint.summary("sdt").mean,
        dppl=joint.summary("dppl").mean if joint.dppl is not None else None,
    )
