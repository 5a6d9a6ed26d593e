"""Table (d), the paper's discriminability: does a metric tell pruning by magnitude from pruning at random?"""

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import dtm_fast as dtm
from benchmarks.paper_tables.laboratory import METRICS, Laboratory
from dtm_fast.compression import Treatment
from dtm_fast.compression.saliency import keep_mask

_SHARE = 0.001


@dataclass(frozen=True)
class RandomPrune(Treatment):
    """So large a share of the weights, drawn at random, to zero."""

    sparsity: float
    seed: int

    @property
    def key(self) -> str:
        return f"random({self.sparsity!r},{self.seed})"

    def compress(self, weight: Tensor, inputs: object = None) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        drawn = torch.rand(weight.shape, generator=generator).to(weight.device)
        return torch.where(keep_mask(drawn, self.sparsity), weight, torch.zeros_like(weight))

    def bits(self, n: int, k: int) -> int:
        return dtm.Prune(self.sparsity).bits(n, k)


def discriminability(lab: Laboratory) -> list[dict[str, Any]]:
    """For each metric: in how many trials random pruning measures worse, the same, better.

    A trial is a component and a seed. 50% is guessing; ties count half.
    """
    draw = random.Random(0)
    trials = [(draw.choice(list(lab.decoder.components)), seed) for seed in range(lab.scale.trials)]
    smallest = {path: {path: dtm.Prune(_SHARE)} for path, _ in trials}
    evaluator = lab.choosing.evaluator
    by_magnitude = dict(zip(smallest, evaluator.measure(list(smallest.values()), METRICS), strict=True))
    at_random = evaluator.measure([{path: RandomPrune(_SHARE, seed)} for path, seed in trials], METRICS)
    counts = {metric: [0, 0, 0] for metric in ("fdt75", "fdt", *METRICS)}
    for (path, _), other in zip(trials, at_random, strict=True):
        for metric, count in counts.items():
            one, two = _harm(by_magnitude[path], metric), _harm(other, metric)
            count[0 if two > one else 1 if two == one else 2] += 1
    return [
        {
            "name": metric,
            "worse": worse,
            "same": same,
            "better": better,
            "told": (worse + same / 2) / len(trials),
        }
        for metric, (worse, same, better) in counts.items()
    ]


def _harm(measurement: dtm.Measurement, metric: str) -> float:
    if metric == "fdt75":
        return -measurement.summary("fdt").p75
    mean = float(getattr(measurement, metric).double().mean())
    return -mean if metric == "fdt" else mean
