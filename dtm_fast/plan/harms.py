"""How much each component's treatment harms, as a number that adds up over components."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from dtm_fast.compression import Treatment
from dtm_fast.errors import InputError
from dtm_fast.measure import Measurement
from dtm_fast.measure.sensitivity import gradient_sensitivity, layer_error
from dtm_fast.plan.recorded import RecordedEvaluator


@dataclass(frozen=True)
class Measured:
    """A harm that is read off the measurement of a component alone.

    Attributes:
        metrics: what must be measured beyond FDT.
        of: the harm.
    """

    metrics: tuple[str, ...]
    of: Callable[[Measurement], float]


def divergence_rate(measurement: Measurement) -> float:
    """First divergences for each token read: the rate at which a text ends agreeing.

    Rates of independent causes add, as those of failures do: whatever diverges first ends the agreement. So the rates
    of single components predict that of all together, which FDT itself does not.
    """
    return _rate(first_divergences(measurement))


def divergent_share(measurement: Measurement) -> float:
    """SDT as a share of the tokens: as ``divergence_rate``, from all positions, those behind a divergence too."""
    return _rate(divergent_tokens(measurement))


def first_divergences(measurement: Measurement) -> tuple[float, float]:
    """How many probes diverged, and how many tokens were read until then."""
    diverged = int((measurement.fdt < measurement.completion).sum())
    return diverged, float((measurement.fdt + 1).clamp(max=measurement.completion).sum())


def divergent_tokens(measurement: Measurement) -> tuple[float, float]:
    """How many tokens diverged, of how many."""
    assert measurement.sdt is not None
    return float(measurement.sdt.sum()), float(len(measurement.sdt) * measurement.completion)


def shrunk(counts: Sequence[tuple[float, float]]) -> list[float]:
    """Rates of (events, exposure) as one expects them to be, knowing the others: each drawn towards the rate of all.

    A unit alone meets few events, often none, and a search picks whoever met fewest: mostly those that were lucky,
    which are not so good together. The rate that is to be expected is, for Poisson counts under a gamma prior whose
    mean is the rate of all and which weighs as much as one event, ``(events + 1) / (exposure + 1 / rate of all)``.

    Source: Efron & Hastie 2016, "Computer Age Statistical Inference", section 6.1 (Robbins' formula, the gamma prior).
    """
    of_all = _rate((sum(events for events, _ in counts), sum(exposure for _, exposure in counts)))
    if of_all == 0:
        return [0.0] * len(counts)
    return [(events + 1) / (exposure + 1 / of_all) for events, exposure in counts]


def _rate(counts: tuple[float, float]) -> float:
    events, exposure = counts
    return events / exposure


def lost_likelihood(measurement: Measurement) -> float:
    """``log(DPPL)``, nats for each token of the base's text: it sees what is too small to change any choice."""
    assert measurement.dppl is not None
    return float(measurement.dppl.log().mean())


def text_likelihood(measurement: Measurement) -> float:
    """``log(perplexity)``, nats for each token of the text itself."""
    assert measurement.perplexity is not None
    return float(measurement.perplexity.log().mean())


def divergence_of_distributions(measurement: Measurement) -> float:
    """KL in nats for each token."""
    assert measurement.kl is not None
    return float(measurement.kl.mean())


MEASURED: dict[str, Measured] = {
    "fdt": Measured((), divergence_rate),
    "sdt": Measured(("sdt",), divergent_share),
    "dppl": Measured(("dppl",), lost_likelihood),
    "perplexity": Measured(("perplexity",), text_likelihood),
    "kl": Measured(("kl",), divergence_of_distributions),
}
"""By what is measured."""

PREDICTED: dict[str, Callable[[RecordedEvaluator, Treatment, Sequence[str]], Mapping[str, float]]] = {
    "layer error": lambda recorded, treatment, paths: layer_error(recorded.decoder, treatment, paths),
    "gradient": lambda recorded, treatment, paths: gradient_sensitivity(
        recorded.decoder, recorded.evaluator.probes, treatment, paths
    ),
}
"""By what predicts harm without measuring: of components, at these paths, under a treatment."""


def check_harms(names: Sequence[str]) -> None:
    """Raises InputError for a name of neither."""
    for name in names:
        if name not in MEASURED and name not in PREDICTED:
            raise InputError(f"no harm {name!r}; known: {', '.join((*MEASURED, *PREDICTED))}")
