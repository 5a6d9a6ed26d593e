"""A measurement: what one configuration did to each probe, never only to their mean."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from dtm_fast.compression import Configuration, configuration_from_json, configuration_to_json
from dtm_fast.errors import InputError, MeasurementError
from dtm_fast.measure.forward import first_divergent
from dtm_fast.measure.statistics import Summary, summarize

# What can be measured beyond FDT, SDT and first_margin, and what each costs on top.
EXTRA_METRICS = {
    "dppl": "a log-sum-exp over the completion's logits",
    "perplexity": "the head on the prefix too",
    "agreement": "the head on the prefix too",
    "kl": "a pass of the base",
}


@dataclass(frozen=True, eq=False)
class Measurement:
    """FDT, SDT and what else was asked of one configuration, per probe.

    Attributes:
        configuration: component → treatment; empty for the base itself.
        completion: N.
        fdt: int64 [P], first divergent token, 0 … N; N where none diverges.
        sdt: int64 [P], number of divergent tokens, 0 … N; None where it was not asked for.
        first_margin: float32 [P], at the first divergence: by how many logits the chosen token beat the
            base's; NaN where none diverges.
        dppl: float64 [P], exp of the mean negative log-likelihood of the base's completion.
        perplexity: float64 [P], the same over the text's own prefix tokens 1 … n - 1.
        agreement: float64 [P], share of those tokens where base and this model prefer the same token
            (llama.cpp's "same top p", on the text itself).
        kl: float64 [P], mean KL(base ‖ this) in nats over the completion.
        seconds: what it took.
        finite: False for ``of_nothing``.
    """

    configuration: Configuration
    completion: int
    fdt: Tensor
    sdt: Tensor | None
    first_margin: Tensor
    dppl: Tensor | None = None
    perplexity: Tensor | None = None
    agreement: Tensor | None = None
    kl: Tensor | None = None
    seconds: float = 0.0
    finite: bool = True

    @classmethod
    def of_nothing(
        cls, configuration: Configuration, probes: int, completion: int, metrics: Sequence[str]
    ) -> "Measurement":
        """Of a configuration whose logits are not finite, which is worth nothing to a search.

        Every token of every probe counts as divergent and as impossible: FDT 0, SDT N, agreement 0, and what is
        measured in likelihoods infinite. Where a single probe has such logits, what the others say is lost.

        Args:
            configuration: component → treatment.
            probes: P.
            completion: N.
            metrics: what was asked for beyond FDT.
        """
        lost = {name: 0.0 if name == "agreement" else math.inf for name in EXTRA_METRICS if name in metrics}
        return cls(
            configuration=configuration,
            completion=completion,
            fdt=torch.zeros(probes, dtype=torch.int64),
            sdt=torch.full((probes,), completion) if metrics else None,
            first_margin=torch.full((probes,), torch.nan),
            seconds=0.0,
            finite=False,
            **{name: torch.full((probes,), value, dtype=torch.float64) for name, value in lost.items()},
        )

    @classmethod
    def of(
        cls,
        configuration: Configuration,
        mismatch: Tensor,
        first_lead: Tensor,
        seconds: float,
        **extra: Tensor | None,
    ) -> "Measurement":
        """Counts ``mismatch`` bool [P, N]; ``first_lead`` float32 [P] is ``forward.lead`` at the first mismatch.

        Raises:
            MeasurementError: if SDT/N > log2(DPPL) on a probe, which no model can do: where it diverges,
                the base's token has at most half of the mass (papers.md §1.2).
        """
        n = mismatch.shape[1]
        measurement = cls.of_first(
            configuration, n, first_divergent(mismatch), first_lead, seconds, sdt=mismatch.sum(dim=1), **extra
        )
        if measurement.dppl is not None:
            slack = mismatch.sum(dim=1) / n - torch.log2(measurement.dppl)
            if bool((slack > 1e-4).any()):
                raise MeasurementError(
                    f"self-test failed: SDT/N exceeds log2(DPPL) by {float(slack.max()):.4f} on a probe"
                )
        return measurement

    @classmethod
    def of_first(
        cls,
        configuration: Configuration,
        completion: int,
        fdt: Tensor,
        first_lead: Tensor,
        seconds: float,
        sdt: Tensor | None = None,
        **extra: Tensor | None,
    ) -> "Measurement":
        """Of ``fdt`` int64 [P] alone; ``first_lead`` as for ``of``."""
        return cls(
            configuration=configuration,
            completion=completion,
            fdt=fdt,
            sdt=sdt,
            first_margin=torch.where(fdt < completion, -first_lead, torch.nan),
            seconds=seconds,
            finite=True,
            **extra,
        )

    def ties(self, floor_margin: float) -> Tensor:
        """bool [P]: the first divergence was decided by no more than rounding alone can move a decision."""
        return self.first_margin <= floor_margin

    def summary(self, metric: str) -> Summary:
        """Mean, median, 75th percentile and intervals of ``metric`` over the probes.

        Raises:
            InputError: it was not measured.
        """
        if metric not in self._summaries:
            raise InputError(f"{metric} was not measured; {', '.join(self._summaries)} were")
        return self._summaries[metric]

    @cached_property
    def _summaries(self) -> dict[str, Summary]:
        names = ("fdt", "sdt", *EXTRA_METRICS)
        return {name: summarize(value) for name in names if (value := getattr(self, name)) is not None}

    def to_json(self) -> dict[str, Any]:
        """Plain lists and numbers; what a journal keeps."""
        stored: dict[str, Any] = {
            "configuration": configuration_to_json(self.configuration),
            "completion": self.completion,
            "seconds": self.seconds,
            "first_margin": _without(self.first_margin, torch.nan),
        }
        for name in ("fdt", "sdt", *EXTRA_METRICS):
            value = getattr(self, name)
            if value is not None:
                stored[name] = _without(value, torch.inf)
        return stored if self.finite else stored | {"finite": False}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> "Measurement":
        """The inverse of ``to_json``, to the bit."""
        margins = _with(stored["first_margin"], torch.nan)
        found = {
            name: torch.tensor(_with(stored[name], torch.inf), dtype=torch.float64)
            for name in EXTRA_METRICS
            if name in stored
        }
        sdt = stored.get("sdt")
        return cls(
            configuration=configuration_from_json(stored["configuration"]),
            completion=stored["completion"],
            fdt=torch.tensor(stored["fdt"], dtype=torch.int64),
            first_margin=torch.tensor(margins, dtype=torch.float32),
            seconds=stored["seconds"],
            sdt=None if sdt is None else torch.tensor(sdt, dtype=torch.int64),
            finite=stored.get("finite", True),
            **found,
        )


def _without(values: Tensor, missing: float) -> list[float | None]:
    """The numbers, None in the place of ``missing``, which JSON does not have."""
    gone = values.isnan() if math.isnan(missing) else values == missing
    return [None if lost else value for value, lost in zip(values.tolist(), gone.tolist(), strict=True)]


def _with(stored: Sequence[float | None], missing: float) -> list[float]:
    """The inverse of ``_without``."""
    return [missing if value is None else value for value in stored]
