"""The sweep of every component alone, and the plan that converts them in order of harm."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from dtm_fast.compression import Treatment
from dtm_fast.errors import InputError
from dtm_fast.measure import Measurement
from dtm_fast.model import Decoder
from dtm_fast.plan.plan import Plan, Point, share_of
from dtm_fast.plan.ranking import RANKINGS, rank
from dtm_fast.plan.recorded import RecordedEvaluator

SEARCH = "in order"


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

    Raises:
        InputError: there is no such ranking, or ``stop`` or ``every`` cannot be meant.

    Source: Deiseroth et al. 2023 (papers.md §1.7), its beam search at width 1 with the order fixed beforehand.
    """
    metrics = metrics_for(ranked_by)
    check_every(every)
    stop.check(recorded.evaluator.probes.completion)
    order = rank(sweep(recorded, treatment, metrics), ranked_by)
    most = _most(recorded.decoder, order, treatment, stop)
    points: dict[int, Point] = {}

    def holds(size: int) -> bool:
        (joint,) = recorded.measure([dict.fromkeys(order[:size], treatment)], metrics)
        points[size] = Point.of(recorded.decoder, joint)
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
        search=SEARCH,
        how={"treatment": treatment.key, "ranked_by": ranked_by, "order": order, "stop": asdict(stop)},
        model=recorded.model_identity,
        calibration=recorded.decoder.calibration,
        curve=[points[size] for size in sorted(points)],
        chosen=points.get(good),
    )


def _most(decoder: Decoder, order: Sequence[str], treatment: Treatment, stop: Stop) -> int:
    """How many components of ``order`` the number and the share of ``stop`` allow."""
    most = len(order) if stop.components is None else min(stop.components, len(order))
    if stop.share is not None:
        while most and share_of(decoder, dict.fromkeys(order[:most], treatment)) > stop.share:
            most -= 1
    return most
