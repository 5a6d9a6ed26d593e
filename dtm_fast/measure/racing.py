"""The best k of many configurations by FDT_75: what cannot be among them is not measured to its end."""

import bisect
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dtm_fast.compression import Configuration, configuration_from_json, configuration_to_json
from dtm_fast.measure.first_divergence import FirstDivergence
from dtm_fast.measure.measurement import Measurement

Name = tuple[tuple[str, str], ...]
"""Component and treatment, sorted: what decides between configurations of equal FDT_75, the lower wins."""


@dataclass(frozen=True, eq=False)
class Dropped:
    """A configuration that is not among the best.

    Attributes:
        configuration: component → treatment.
        highest: no more than this FDT_75 is possible for it (or likely, where ``proved`` is not).
        seen: int64 [P], how many positions of each probe's completion were read.
        proved: whether bounds prove it, and not only statistics.
    """

    configuration: Configuration
    highest: float
    seen: Tensor
    proved: bool

    def to_json(self) -> dict[str, Any]:
        """Plain lists and numbers; what a journal keeps."""
        return {
            "configuration": configuration_to_json(self.configuration),
            "highest": self.highest,
            "seen": self.seen.tolist(),
            "proved": self.proved,
        }

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> "Dropped":
        """The inverse of ``to_json``."""
        return cls(
            configuration=configuration_from_json(stored["configuration"]),
            highest=stored["highest"],
            seen=torch.tensor(stored["seen"], dtype=torch.int64),
            proved=stored["proved"],
        )


@dataclass(frozen=True, eq=False)
class Race:
    """How a race ended.

    Attributes:
        best: the k best, the best first; fewer if there are fewer. Measured exactly, FDT alone.
        dropped: all others.
    """

    best: list[Measurement]
    dropped: list[Dropped] = field(default_factory=list)


def name_of(configuration: Configuration) -> Name:
    """What breaks ties."""
    return tuple(sorted((path, treatment.key) for path, treatment in configuration.items()))


def fdt75(fdt: Tensor) -> float:
    """The 75th percentile of FDT [P], as ``Summary.p75``."""
    return float(np.percentile(fdt.double().numpy(), 75))


class Contest:
    """Says whom to read no further: who cannot be among the k best of those measured so far.

    Args:
        k: how many are wanted.
        margins: float32 [P, N], of the probes: those of the smallest are read first, for they diverge soonest.
        error: the probability with which a configuration of the k best may be dropped for having too few good probes
            among those that were read; 0 for proofs alone.
        known: what earlier races found on the same probes.
    """

    def __init__(
        self, k: int, margins: Tensor, error: float = 0.0, known: "Iterable[Measurement | Dropped]" = ()
    ) -> None:
        """Nobody is measured but who is known."""
        self._k = k
        self._error = error
        self._best: list[tuple[float, Name]] = []
        self._bounds: dict[Name, float] = {}
        probes, self._completion = margins.shape
        # A percentile is settled as low once more than three quarters of the probes are: the rest may wait.
        first = min(probes, math.floor(0.75 * (probes - 1)) + 2)
        order = margins.amin(dim=1).argsort(stable=True).tolist()
        if error > 0:  # statistics need probes at random
            order = torch.randperm(probes, generator=torch.Generator().manual_seed(0)).tolist()
            cuts = sorted({math.ceil(probes * share) for share in (0.25, 0.5, 0.75)} | {probes})
        else:
            cuts = sorted({first, probes})
        self.groups: Sequence[Sequence[int]] = [
            order[begin:end] for begin, end in zip([0, *cuts[:-1]], cuts, strict=True)
        ]
        for each in known:
            if isinstance(each, Measurement):
                self.take(each.configuration, each.fdt)
            elif each.proved:
                self._bounds[name_of(each.configuration)] = each.highest

    def highest(self, configuration: Configuration) -> float:
        """The FDT_75 that a configuration can have at most, before it is read."""
        return self._bounds.get(name_of(configuration), float(self._completion))

    def cannot_win(self, configuration: Configuration, highest: float) -> bool:
        """Whether a configuration whose FDT_75 is at most this is not among the best."""
        if len(self._best) < self._k:
            return False
        return self._best[self._k - 1] < (-highest, name_of(configuration))

    def referee(self, configuration: Configuration) -> "Judge":
        """Who says when to drop this configuration."""
        return Judge(self, configuration)

    def take(self, configuration: Configuration, fdt: Tensor) -> None:
        """A configuration's exact FDT."""
        bisect.insort(self._best, (-fdt75(fdt), name_of(configuration)))

    def why_lost(self, configuration: Configuration, found: FirstDivergence) -> Dropped | None:
        """What is known of a configuration that cannot, or will hardly, be among the best; else None."""
        _, upper = found.bounds()
        highest = fdt75(upper)
        if self.cannot_win(configuration, highest):
            return Dropped(configuration, highest, found.seen.clone(), proved=True)
        if self._error > 0 and len(self._best) >= self._k and self._hardly(found, upper):
            return Dropped(configuration, -self._best[self._k - 1][0], found.seen.clone(), proved=False)
        return None

    def _hardly(self, found: FirstDivergence, upper: Tensor) -> bool:
        """Whether so few good probes among those read have a probability below the error, if there were enough.

        FDT_75 reaches a threshold only if ``needed`` of the P probes do. Of those read (at random, without putting
        back) the number that do is then hypergeometric, and at most that of those that still may.
        """
        threshold = -self._best[self._k - 1][0]
        probes = len(upper)
        needed = probes - math.ceil(0.75 * (probes - 1))
        read = found.seen > 0
        good = int((read & (upper >= threshold)).sum())
        drawn = int(read.sum())
        ways = sum(
            math.comb(needed, hits) * math.comb(probes - needed, drawn - hits)
            for hits in range(min(good, needed, drawn) + 1)
        )
        return ways / math.comb(probes, drawn) < self._error


class Judge:
    """A ``Referee`` who drops one configuration once it cannot win; ``lost`` then says why."""

    def __init__(self, contest: Contest, configuration: Configuration) -> None:
        """Nothing was read yet."""
        self.groups = contest.groups
        self.lost: Dropped | None = None
        self._contest = contest
        self._configuration = configuration

    def goes_on(self, found: FirstDivergence) -> bool:
        """Whether it can still win."""
        self.lost = self._contest.why_lost(self._configuration, found)
        return self.lost is None
