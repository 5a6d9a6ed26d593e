"""What one says of a metric over probes: mean, median, 75th percentile, with bootstrap intervals."""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

_RESAMPLES = 1000
_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Summary:
    """A metric over probes; intervals are 95% percentile bootstrap over probes (1,000 resamples, fixed seed)."""

    mean: float
    mean_interval: tuple[float, float]
    median: float
    p75: float
    p75_interval: tuple[float, float]


def summarize(values: Tensor) -> Summary:
    """Summarizes ``values`` [P]; percentiles interpolate linearly, as ``numpy.percentile`` does.

    For FDT, ``p75`` is the FDT_75 of Deiseroth et al. 2023 (papers.md §1.1).
    """
    sample = values.double().numpy()
    if (sample == sample[0]).all():  # also infinite ones, between which nothing can be interpolated
        same = float(sample[0])
        return Summary(same, (same, same), same, same, (same, same))
    drawn = sample[np.random.default_rng(0).integers(0, len(sample), size=(_RESAMPLES, len(sample)))]
    tails = [100 * (1 - _CONFIDENCE) / 2, 100 * (1 + _CONFIDENCE) / 2]
    mean_low, mean_high = np.percentile(drawn.mean(axis=1), tails)
    p75_low, p75_high = np.percentile(np.percentile(drawn, 75, axis=1), tails)
    return Summary(
        mean=float(sample.mean()),
        mean_interval=(float(mean_low), float(mean_high)),
        median=float(np.median(sample)),
        p75=float(np.percentile(sample, 75)),
        p75_interval=(float(p75_low), float(p75_high)),
    )
