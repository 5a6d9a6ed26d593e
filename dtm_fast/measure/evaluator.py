"""The fast evaluator: many configurations in one walk, what they share computed once."""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal

from transformers import PreTrainedModel

from dtm_fast.compression import Configuration, check_configuration
from dtm_fast.errors import MeasurementError, ModelError
from dtm_fast.measure.complete_pass import Columns, CompletePass
from dtm_fast.measure.first_pass import FirstPass
from dtm_fast.measure.floor import Floor, self_divergence
from dtm_fast.measure.fused_layers import FusedLayers
from dtm_fast.measure.head import Head
from dtm_fast.measure.measurement import Measurement
from dtm_fast.measure.model_layers import ModelLayers
from dtm_fast.measure.probes import Probes
from dtm_fast.measure.reference import checked_metrics, describe
from dtm_fast.measure.tensor_store import TensorStore
from dtm_fast.model import Decoder


class Evaluator:
    """Measures what ``ReferenceEvaluator`` measures, with what configurations share computed once.

    Args:
        model: the model whose components the configurations name, in eval mode; not to be changed any more.
        probes: made by this model.
        memory: bytes that the base's states may take in memory; less makes it slower, and what does not fit at all
            goes to a file (TMPDIR). None for no bound.
        layers: ``"fused"`` for this package's kernels, ``"transformers"`` for the model's own layers, ``"auto"`` for
            the kernels where they can run.

    Raises:
        ModelError: the model's layers cannot be run one by one, or not as ``layers`` asks.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        probes: Probes,
        *,
        memory: int | None = None,
        layers: Literal["auto", "fused", "transformers"] = "auto",
    ) -> None:
        """Reads the probes once with the base and keeps its states."""
        self.model = model
        self.probes = probes
        self.decoder = Decoder.of(model)
        self._store = TensorStore(memory)
        self._model_layers = ModelLayers(self.decoder, probes, self._store)
        self._fused: FusedLayers | None = None
        self.engine = "transformers' own layers"
        """Which layers run, in a few words, and why not the fused ones."""
        if layers != "transformers":
            try:
                left = None if memory is None else memory - self._store.in_memory
                self._fused = FusedLayers(self._model_layers, self._store, left)
                self.engine = f"fused layers, {self._fused.arithmetic.name.lower()}"
            except ModelError as error:
                if layers == "fused":
                    raise
                self.engine += f" ({error})"
        self._head = self._head_of_base() if self._model_layers.plain_head else None
        self._complete = CompletePass(self._model_layers, self._fused, self._head)
        self._first: FirstPass | None = None
        if self._fused is not None and self._head is not None:
            self._first = FirstPass(self._fused, self._head, probes.prefix)

    def _head_of_base(self) -> Head:
        module: Any = self.model.get_output_embeddings()
        if self._fused is None:
            hidden = self._model_layers.head_input(self._model_layers.base(len(self.decoder.layers)))
        else:
            hidden = self._fused.head_input(
                None,
                self._fused.exact,
                range(len(self.probes)),
                self.probes.prefix - 1,
                self._fused.positions,
            )
        return Head(module.weight, hidden, self.probes.tokens[:, self.probes.prefix :])

    @property
    def layer_evaluations(self) -> int:
        """Layers of configurations run so far; those that several share are counted once, the base's not at all."""
        return self._complete.layer_evaluations + (self._first.layer_evaluations if self._first else 0)

    @cached_property
    def floor(self) -> Floor:
        """How far the base diverges from itself under another batch shape, or under this evaluator's own layers."""
        floor = self_divergence(self.model, self.probes)
        if self._fused is None or self._head is None:
            return floor
        by_model = self._model_layers.head_input(self._model_layers.base(len(self.decoder.layers)))
        return replace(floor, margin=max(floor.margin, self._head.largest_move(by_model)))

    def measure(
        self, configurations: Iterable[Configuration], metrics: Sequence[str] = ("sdt",)
    ) -> list[Measurement]:
        """The measurement of each configuration, in order; arguments and errors as ``iterate``."""
        wanted = list(configurations)
        found = dict(self._measured(wanted, metrics))
        return [found[index] for index in range(len(wanted))]

    def iterate(
        self, configurations: Iterable[Configuration], metrics: Sequence[str] = ("sdt",)
    ) -> Iterator[Measurement]:
        """Measures the configurations in the order that shares most, and hands each over as it is done.

        Args:
            configurations: ``{}`` is the model as it is.
            metrics: what to measure beyond FDT; names of ``EXTRA_METRICS``. Without any, a probe is left as soon as it
                diverges, and a float32 model is computed by differences to the base where these decide.

        Raises:
            ComponentError, TreatmentError: a configuration does not fit the model; nothing is measured then.
            MeasurementError: configurations give logits that are not finite, or break the self-test; raised after all
                others have been handed over.
            ProbeError: a metric of the prefix where that is one token.
            ValueError: an unknown metric.
        """
        return (measurement for _, measurement in self._measured(list(configurations), metrics))

    def _measured(
        self, configurations: Sequence[Configuration], metrics: Sequence[str]
    ) -> Iterator[tuple[int, Measurement]]:
        wanted = checked_metrics(metrics, self.probes)
        for configuration in configurations:
            check_configuration(self.decoder, configuration)
        failed: list[str] = []
        clock = time.perf_counter()
        for indices, result in self._results(configurations, wanted):
            configuration = configurations[indices[0]]
            try:
                if isinstance(result, MeasurementError):
                    raise result
                now = time.perf_counter()
                seconds, clock = (now - clock) / len(indices), now
                measurement = _measurement(configuration, self.probes.completion, result, seconds)
            except MeasurementError as error:
                failed.append(f"{describe(configuration)}: {error}")
                continue
            for index in indices:
                yield index, replace(measurement, configuration=configurations[index])
        if failed:
            more = f" (and {len(failed) - 1} more configurations failed)" if len(failed) > 1 else ""
            raise MeasurementError(failed[0] + more)

    def _results(
        self, configurations: Sequence[Configuration], metrics: frozenset[str]
    ) -> Iterator[tuple[list[int], Columns | MeasurementError]]:
        if metrics or self._first is None:
            return self._complete.results(configurations, metrics)
        # The base's own text is what the model's own pass chooses: no other arithmetic is asked.
        base = [index for index, configuration in enumerate(configurations) if not configuration]
        others = [index for index, configuration in enumerate(configurations) if configuration]
        return self._first_and_complete(configurations, base, others)

    def _first_and_complete(
        self, configurations: Sequence[Configuration], base: list[int], others: list[int]
    ) -> Iterator[tuple[list[int], Columns | MeasurementError]]:
        assert self._first is not None
        for indices, result in self._complete.results([configurations[i] for i in base], frozenset()):
            yield [base[index] for index in indices], result
        for indices, result in self._first.results([configurations[i] for i in others]):
            yield [others[index] for index in indices], result


def _measurement(
    configuration: Configuration, completion: int, columns: Columns, seconds: float
) -> Measurement:
    if "fdt" in columns:
        return Measurement.of_first(configuration, completion, columns["fdt"], columns["first_lead"], seconds)
    return Measurement.of(configuration, seconds=seconds, **columns)
