"""The oracle: one plain teacher-forced Hugging Face pass per configuration, the weights swapped in."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from torch import Tensor

from dtm_fast.compression import Change, Configuration
from dtm_fast.errors import NotFiniteError, ProbeError
from dtm_fast.measure.columns import OF_THE_PREFIX, columns_of, first_predicted, joined
from dtm_fast.measure.floor import Floor, self_divergence
from dtm_fast.measure.forward import logits_before
from dtm_fast.measure.measurement import EXTRA_METRICS, Measurement
from dtm_fast.measure.probes import Probes
from dtm_fast.model import Calibration, Decoder, check_eval_mode

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ReferenceEvaluator:
    """Measures configurations the slow and obvious way; every faster evaluator must give what it gives.

    Args:
        model: the model whose components the configurations name, in eval mode.
        probes: made by the base model.
        base: the base model where it is not ``model`` itself (to measure a model compressed elsewhere, whose
            configuration is then ``{}``); only ``"kl"`` needs it.
        calibration: of ``model``, for treatments that look at a component's inputs.

    Raises:
        ModelError: a model is in train mode, its components are not found, or the calibration is of another model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        probes: Probes,
        *,
        base: PreTrainedModel | None = None,
        calibration: Calibration | None = None,
    ) -> None:
        """Looks for the model's components; measures nothing yet."""
        self.model = model
        self.probes = probes
        self.base = model if base is None else base
        check_eval_mode(self.model)
        check_eval_mode(self.base)
        self.decoder = Decoder.of(model, calibration)

    def afresh(self) -> ReferenceEvaluator:
        """The same evaluator of the model as it is now, after its weights were changed; without a calibration."""
        return ReferenceEvaluator(self.model, self.probes, base=self.base)

    @cached_property
    def floor(self) -> Floor:
        """How far the base diverges from itself under another batch shape; two passes of the base."""
        return self_divergence(self.base, self.probes)

    def measure(
        self, configurations: Iterable[Configuration], metrics: Sequence[str] = ("sdt",)
    ) -> list[Measurement]:
        """``list(self.iterate(configurations, metrics))``."""
        return list(self.iterate(configurations, metrics))

    def iterate(
        self, configurations: Iterable[Configuration], metrics: Sequence[str] = ("sdt",)
    ) -> Iterator[Measurement]:
        """Measures one configuration after the other and hands each over as it is done.

        Args:
            configurations: ``{}`` is the model as it is.
            metrics: what to measure beyond FDT and SDT, which are always measured: names of ``EXTRA_METRICS``.

        Raises:
            ComponentError, TreatmentError: a configuration does not fit the model.
            NotFiniteError: a configuration gives logits that are not finite.
            MeasurementError: a configuration breaks the self-test.
            ProbeError: a metric of the prefix where that is one token.
            ValueError: an unknown metric.
        """
        wanted = checked_metrics(metrics, self.probes)
        for configuration in several(configurations):
            yield self._measure(configuration, wanted)

    def _measure(self, configuration: Configuration, metrics: frozenset[str]) -> Measurement:
        started = time.perf_counter()
        change = Change(self.decoder, configuration)
        n, rows = self.probes.prefix, self.probes.batch_size
        parts = []
        for tokens, prefix_choices in zip(
            self.probes.tokens.split(rows), self.probes.prefix_choices.split(rows), strict=True
        ):
            try:
                with change:
                    logits = logits_before(self.model, tokens, first_predicted(metrics, n))
            except NotFiniteError as error:
                other = not configuration and self.model is not self.base
                whose = "the compressed model" if other else describe(configuration)
                raise NotFiniteError(f"{whose}: {error}", [configuration]) from error

            def base_logits(tokens: Tensor = tokens) -> Tensor:
                return logits_before(self.base, tokens, n)

            parts.append(columns_of(logits, tokens, n, metrics, base_logits, prefix_choices))
        return Measurement.of(configuration, seconds=time.perf_counter() - started, **joined(parts))


def several(configurations: Iterable[Configuration]) -> Iterable[Configuration]:
    """The same; raises ValueError where it is one configuration, of which a loop would see the components."""
    if isinstance(configurations, Mapping):
        raise ValueError("configurations: expected a list of configurations, not one")
    return configurations


def checked_metrics(metrics: Sequence[str], probes: Probes) -> frozenset[str]:
    """The names in ``metrics``, each once; raises as ``ReferenceEvaluator.iterate`` does."""
    if isinstance(metrics, str):
        raise ValueError(f"metrics: expected a list of names, not {metrics!r}")
    known = ("sdt", *EXTRA_METRICS)
    unknown = set(metrics) - set(known)
    if unknown:
        raise ValueError(f"no metric {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    if probes.prefix == 1 and OF_THE_PREFIX & set(metrics):
        raise ProbeError("perplexity and agreement are of the prefix, which has no second token at n = 1")
    return frozenset(metrics)


def describe(configuration: Configuration) -> str:
    """A few words that name a configuration in a message."""
    if not configuration:
        return "the base"
    path, treatment = next(iter(configuration.items()))
    more = f" and {len(configuration) - 1} more" if len(configuration) > 1 else ""
    return f"{path} under {treatment.key}{more}"
