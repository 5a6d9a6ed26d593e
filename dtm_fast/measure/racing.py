"""The best k of many configurations by FDT: what cannot be among them is not measured to its end."""

import bisect
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from dtm_fast.compression import Configuration, Name, configuration_from_json, configuration_to_json, name_of
from dtm_fast.measure.first_divergence import FirstDivergence
from dtm_fast.measure.measurement import Measurement

By: TypeAlias = Literal["fdt75", "fdt75+mean"]
"""What decides a race: FDT_75, or where that is equal mean FDT."""

Standing: TypeAlias = tuple[float, float]
"""FDT_75 and mean FDT: those of a configuration, or the most that each of them can be."""


@dataclass(frozen=True, eq=False)
class Dropped:
    """A configuration that is not among the best.

    Attributes:
        configuration: component → treatment.
        highest: no more than this FDT_75 is possible for it (or likely, where ``proved`` is not).
        seen: int64 [P], how many positions of each probe's completion were read.
        proved: whether bounds prove it, and not only statistics.
        highest_mean: no more than this mean FDT is possible for it; None where that was not kept.
    """

    configuration: Configuration
    highest: float
    seen: Tensor
    proved: bool
    highest_mean: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain lists and numbers; what a journal keeps."""
        return {
            "configuration": configuration_to_json(self.configuration),
            "highest": self.highest,
            "seen": self.seen.tolist(),
            "proved": self.proved,
            "highest_mean": self.highest_mean,
        }

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> "Dropped":
        """The inverse of ``to_json``."""
        return cls(
            configuration=configuration_from_json(stored["configuration"]),
            highest=stored["highest"],
            seen=torch.tensor(stored["seen"], dtype=torch.int64),
            proved=stored["proved"],
            highest_mean=stored.get("highest_mean"),
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


def one_each(known: "Iterable[Measurement | Dropped]") -> "list[Measurement | Dropped]":
    """The same with each configuration once: its first measurement, or else its last bound, if possible proved."""
    found: dict[Name, Measurement | Dropped] = {}
    for each in known:
        before = found.setdefault(name_of(each.configuration), each)
        says_less = isinstance(each, Dropped) and not each.proved
        if isinstance(before, Dropped) and not says_less:
            found[name_of(each.configuration)] = each
    return list(found.values())


def fdt75(fdt: Tensor) -> float:
    """The 75th percentile of FDT [P], as ``Summary.p75``."""
    return float(np.percentile(fdt.double().numpy(), 75))


def standing(fdt: Tensor) -> Standing:
    """FDT_75 and the mean of FDT [P], as ``Summary`` has them."""
    return fdt75(fdt), float(fdt.double().numpy().mean())


def place(reached: Standing, name: Name, by: By) -> tuple[tuple[float, ...], Name]:
    """What configurations are sorted by, the best first; equals stand by name.

    Args:
        reached: by the configuration.
        name: its.
        by: what decides.
    """
    first, mean = reached
    return ((-first,) if by == "fdt75" else (-first, -mean)), name


class Contest:
    """Says whom to read no further: who cannot be among the k best of those measured so far.

    Args:
        k: how many are wanted.
        margins: float32 [P, N], of the probes: those of the smallest are read first, for they diverge soonest.
        error: the probability with which a configuration of the k best may be dropped for having too few good probes
            among those that were read; 0 for proofs alone.
        known: what earlier races found on the same probes, whatever decided those.
        by: what decides.
    """

    def __init__(
        self,
        k: int,
        margins: Tensor,
        error: float = 0.0,
        known: "Iterable[Measurement | Dropped]" = (),
        by: By = "fdt75",
    ) -> None:
        """Nobody is measured but who is known."""
        self._k = k
        self._error = error
        self._by = by
        self._best: list[tuple[tuple[float, ...], Name]] = []
        self._bounds: dict[Name, Standing] = {}
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
                mean = self._completion if each.highest_mean is None else each.highest_mean
                self._bounds[name_of(each.configuration)] = each.highest, mean

    def turn(self, index: int, configuration: Configuration) -> tuple[Name, int]:
        """What candidates are read in the order of, the lowest first.

        Of equal FDT_75 the lowest names win: they come first. Where means tell candidates apart as well, names say
        nothing, and whoever gave them may have put the most promising first.

        Args:
            index: the candidate's place among those given.
            configuration: the candidate.
        """
        return (name_of(configuration) if self._by == "fdt75" else ()), index

    def cannot_win(self, configuration: Configuration, highest: Standing) -> bool:
        """Whether a configuration of at most this FDT_75 and at most this mean FDT is not among the best."""
        if len(self._best) < self._k:
            return False
        return self._best[self._k - 1] < place(highest, name_of(configuration), self._by)

    def referee(self, configuration: Configuration) -> "Judge":
        """Who says when to drop this configuration."""
        return Judge(self, configuration)

    def take(self, configuration: Configuration, fdt: Tensor) -> None:
        """A configuration's exact FDT."""
        bisect.insort(self._best, place(standing(fdt), name_of(configuration), self._by))

    def why_lost(self, configuration: Configuration, found: FirstDivergence) -> Dropped | None:
        """What is known of a configuration that cannot, or will hardly, be among the best; else None."""
        _, upper = found.bounds()
        possible = standing(upper)
        first, mean = map(min, possible, self._bounds.get(name_of(configuration), possible))
        if self.cannot_win(configuration, (first, mean)):
            return Dropped(configuration, first, found.seen.clone(), proved=True, highest_mean=mean)
        if self._error > 0 and len(self._best) >= self._k and self._hardly(found, upper):
            return Dropped(
                configuration, self._threshold, found.seen.clone(), proved=False, highest_mean=mean
            )
        return None

    @property
    def _threshold(self) -> float:
        """The FDT_75 of the last of the k best, which whoever is to be one of them must reach."""
        return -self._best[self._k - 1][0][0]

    def _hardly(self, found: FirstDivergence, upper: Tensor) -> bool:
        """Whether so few good probes among those read have a probability below the error, if there were enough.

        FDT_75 reaches a threshold only if ``needed`` of the P probes do. Of those read (at random, without putting
        back) the number that do is then hypergeometric, and at most that of those that still may.
        """
        threshold = self._threshold
        probes = len(upper)
        needed = probes - math.ceil(0.75 * (probes - 1))
        read = found.seen > 0
        good = int((read & (upper >= threshold)).sum())
        drawn = int(read.sum())
        ways = sum(
            math.comb(needed, hits) * math.comb(probes - needed, drawn - hits)
            for hits in range(min(good, needed, drawn) + 1)
        )
        # The question is asked after every group but the last, and the chances of being wrong add up.
        return ways / math.comb(probes, drawn) < self._error / max(1, len(self.groups) - 1)


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
