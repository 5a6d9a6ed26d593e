"""The oracle: one plain teacher-forced Hugging Face pass per configuration, the weights swapped in."""

import time
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property

import torch
from transformers import PreTrainedModel

from dtm_fast.compression import Change, Configuration
from dtm_fast.errors import MeasurementError, ProbeError
from dtm_fast.measure.floor import Floor, self_divergence
from dtm_fast.measure.forward import choice, kl_divergence, lead, logits_before, negative_log_likelihood
from dtm_fast.measure.measurement import EXTRA_METRICS, Measurement
from dtm_fast.measure.probes import Probes
from dtm_fast.model import Decoder


class ReferenceEvaluator:
    """Measures configurations the slow and obvious way; every faster evaluator must give what it gives.

    Args:
        model: the model whose components the configurations name, in eval mode.
        probes: made by the base model.
        base: the base model where it is not ``model`` itself (to measure a model compressed elsewhere, whose
            configuration is then ``{}``); only ``"kl"`` needs it.
    """

    def __init__(
        self, model: PreTrainedModel, probes: Probes, *, base: PreTrainedModel | None = None
    ) -> None:
        """Looks for the model's components; measures nothing yet."""
        self.model = model
        self.probes = probes
        self.base = model if base is None else base
        self.decoder = Decoder.of(model)

    @cached_property
    def floor(self) -> Floor:
        """How far the base diverges from itself under another batch shape; two passes of the base."""
        return self_divergence(self.base, self.probes)

    def measure(
        self, configurations: Iterable[Configuration], metrics: Sequence[str] = ("dppl",)
    ) -> list[Measurement]:
        """``list(self.iterate(configurations, metrics))``."""
        return list(self.iterate(configurations, metrics))

    def iterate(
        self, configurations: Iterable[Configuration], metrics: Sequence[str] = ("dppl",)
    ) -> Iterator[Measurement]:
        """Measures one configuration after the other and hands each over as it is done.

        Args:
            configurations: ``{}`` is the model as it is.
            metrics: what to measure beyond FDT and SDT; names of ``EXTRA_METRICS``.

        Raises:
            ComponentError, TreatmentError: a configuration does not fit the model.
            MeasurementError: a configuration gives logits that are not finite, or breaks the self-test.
            ProbeError: a metric of the prefix where that is one token.
            ValueError: an unknown metric.
        """
        unknown = set(metrics) - set(EXTRA_METRICS)
        if unknown:
            raise ValueError(f"no metric {', '.join(sorted(unknown))}; known: {', '.join(EXTRA_METRICS)}")
        if self.probes.prefix == 1 and {"perplexity", "agreement"} & set(metrics):
            raise ProbeError("perplexity and agreement are of the prefix, which has no second token at n = 1")
        for configuration in configurations:
            yield self._measure(configuration, frozenset(metrics))

    def _measure(self, configuration: Configuration, metrics: frozenset[str]) -> Measurement:
        started = time.perf_counter()
        change = Change(self.decoder, configuration)
        n = self.probes.prefix
        first = 1 if metrics & {"perplexity", "agreement"} else n
        columns: dict[str, list[torch.Tensor]] = {}
        rows = self.probes.batch_size
        for tokens, prefix_choices in zip(
            self.probes.tokens.split(rows), self.probes.prefix_choices.split(rows), strict=True
        ):
            try:
                with change:
                    all_logits = logits_before(self.model, tokens, first)
            except MeasurementError as error:
                raise MeasurementError(f"{_describe(configuration)}: {error}") from error
            reference = tokens.to(all_logits.device)
            logits, completion = all_logits[:, n - first :], reference[:, n:]
            found = {"mismatch": choice(logits) != completion, "lead": lead(logits, completion)}
            if "dppl" in metrics:
                found["dppl"] = negative_log_likelihood(logits, completion).double().mean(dim=1).exp()
            if "kl" in metrics:
                base = logits_before(self.base, tokens, n)
                found["kl"] = kl_divergence(base, logits).double().mean(dim=1)
            if "perplexity" in metrics:
                nll = negative_log_likelihood(all_logits[:, : n - 1], reference[:, 1:n])
                found["perplexity"] = nll.double().mean(dim=1).exp()
            if "agreement" in metrics:
                agrees = choice(all_logits[:, : n - 1]).cpu() == prefix_choices
                found["agreement"] = agrees.double().mean(dim=1)
            for name, column in found.items():
                columns.setdefault(name, []).append(column.cpu())
        joined = {name: torch.cat(column) for name, column in columns.items()}
        return Measurement.of(configuration, seconds=time.perf_counter() - started, **joined)


def _describe(configuration: Configuration) -> str:
    if not configuration:
        return "the base"
    path, treatment = next(iter(configuration.items()))
    more = f" and {len(configuration) - 1} more" if len(configuration) > 1 else ""
    return f"{path} under {treatment.key}{more}"
