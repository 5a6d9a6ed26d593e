"""The fast evaluator: many configurations in one walk, what they share computed once."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from dtm_fast.compression import Configuration, check_configuration, name_of
from dtm_fast.errors import MeasurementError, ModelError, NotFiniteError
from dtm_fast.measure.complete_pass import Columns, CompletePass
from dtm_fast.measure.device_layer import DeviceLayer, device_layers_of
from dtm_fast.measure.device_layers import DeviceLayers
from dtm_fast.measure.difference_error import error_scale
from dtm_fast.measure.first_pass import FirstPass, Results
from dtm_fast.measure.floor import Floor, self_divergence
from dtm_fast.measure.free_memory import free_memory
from dtm_fast.measure.fused_layers import FusedLayers, checked_parts
from dtm_fast.measure.head import Head, can_prove
from dtm_fast.measure.measurement import Measurement
from dtm_fast.measure.model_layers import ModelLayers
from dtm_fast.measure.part_layers import PartHead
from dtm_fast.measure.probes import Probes
from dtm_fast.measure.racing import By, Contest, Dropped, Race, one_each, place, standing
from dtm_fast.measure.reference import checked_metrics, describe, several
from dtm_fast.measure.tensor_store import TensorStore
from dtm_fast.measure.whole_head import WholeHead
from dtm_fast.model import Calibration, Decoder, check_eval_mode
from dtm_fast.model.gated_decoder import LayerParts
from dtm_fast.ops.decoder_layer import States

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Engine: TypeAlias = Literal["auto", "fused", "torch", "differences", "transformers"]
"""Which layers run: this package's kernels, torch's operations on parts of the text, exactly or on differences to the
base, or the model's own layers."""


class Evaluator:
    """Measures what ``ReferenceEvaluator`` measures, with what configurations share computed once.

    Args:
        model: the model whose components the configurations name, in eval mode; not to be changed any more.
        probes: made by this model.
        memory: bytes that the base's states may take in the memory of the model's device, by default half of what is
            free. Less makes it slower, and what cannot be left out goes to the host's memory, of a GPU, or to a file
            (TMPDIR).
        layers: ``"fused"`` for this package's kernels, ``"torch"`` for torch's operations on parts of the text (FDT
            and SDT; other metrics come from the model's own layers), ``"differences"`` for the same with FDT from
            differences to the base, whose products are in bfloat16 and whose doubts are settled in float32 (of a
            float32 model), ``"transformers"`` for the model's own layers, ``"auto"`` on a CPU for the kernels and on a
            GPU for torch's operations, where they can run.
        calibration: of this model, for treatments that look at a component's inputs.

    Raises:
        ModelError: the model is in train mode, its layers cannot be run one by one, or not as ``layers`` asks, or the
            calibration is of another model.
        ValueError: an unknown ``layers``, or ``memory`` is no number of bytes.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        probes: Probes,
        *,
        memory: int | None = None,
        layers: Engine = "auto",
        calibration: Calibration | None = None,
    ) -> None:
        """Reads the probes once with the base and keeps its states."""
        if layers not in get_args(Engine):
            raise ValueError(f"layers must be one of {', '.join(get_args(Engine))}, not {layers!r}")
        if memory is not None and (isinstance(memory, bool) or not isinstance(memory, int) or memory < 0):
            raise ValueError(f"memory must be a whole number of at least 0 bytes, not {memory!r}")
        check_eval_mode(model)
        self.model = model
        self.probes = probes
        self.decoder = Decoder.of(model, calibration)
        self._given: tuple[int | None, Engine] = (memory, layers)
        parts, in_torch, why_not = self._own_layers(layers)
        memory = free_memory(model.device) // 2 if memory is None else memory
        store = TensorStore(memory)
        self._model_layers = ModelLayers(self.decoder, probes, store, all_states=parts is None)
        self._layers: FusedLayers | DeviceLayers | None = None
        self.engine = "transformers' own layers" + (f" ({why_not})" if why_not else "")
        """Which layers run, in a few words, and why not the fused ones."""
        if parts is not None:
            self._layers = FusedLayers(parts, self._model_layers, store, memory)
        elif in_torch is not None:
            self._layers = DeviceLayers(
                in_torch, self._model_layers, memory, by_differences=layers == "differences"
            )
        if self._layers is not None:
            self.engine = self._layers.engine
        provable = self._model_layers.plain_head and can_prove(model.get_output_embeddings().weight)
        fused = self._layers if isinstance(self._layers, FusedLayers) else None
        if layers == "differences" and not provable:
            raise ModelError("differences need a head of which decisions can be proved")
        self._head = self._head_of(fused) if provable else None
        self._scale: float | None = 1.0
        self._first: FirstPass | None = None
        decides: PartHead | None = None
        if self._layers is not None and self._head is not None:
            decides = self._part_head(self._layers)
            self._scale = self._error_scale(self._layers)
            if self._scale is None:
                self.engine += " (without differences: their error is too large on this model)"
            self._first = FirstPass(self._layers, decides, probes.prefix, self._scale)
        self._complete = CompletePass(self._model_layers, self._layers, self._head, decides)

    def _own_layers(self, layers: Engine) -> tuple[list[LayerParts] | None, list[DeviceLayer] | None, str]:
        """What layers of our own are made of, either kind, or why there are none."""
        if layers == "transformers":
            return None, None, ""
        tokens = self.probes.tokens[:1]
        try:
            if layers == "differences" and self.model.dtype != torch.float32:
                raise ModelError(f"the model is in {self.model.dtype}, and differences are for float32")
            if layers in ("torch", "differences") or (layers == "auto" and self.model.device.type == "cuda"):
                return None, device_layers_of(self.decoder, tokens), ""
            return checked_parts(self.decoder, tokens), None, ""
        except ModelError as error:
            if layers != "auto":
                raise
            return None, None, str(error)

    def _error_scale(self, layers: FusedLayers | DeviceLayers) -> float | None:
        if not layers.arithmetic.is_change:
            return 1.0
        module: Any = self.model.get_output_embeddings()
        return error_scale(layers, module.weight.detach(), self.probes.tokens, self.probes.prefix)

    def _head_of(self, fused: FusedLayers | DeviceLayers | None) -> Head:
        module: Any = self.model.get_output_embeddings()
        return Head(module.weight, self._head_input(fused), self.probes.tokens[:, self.probes.prefix :])

    def _part_head(self, layers: FusedLayers | DeviceLayers) -> PartHead:
        """What decides of parts that these layers read; that of the model's own states is made already."""
        if isinstance(layers, DeviceLayers) and not layers.arithmetic.is_change:
            module: Any = self.model.get_output_embeddings()
            completions = self.probes.tokens[:, self.probes.prefix :]
            return WholeHead(module.weight, self._head_input(layers), completions)
        if layers is layers.of_the_model and self._head is not None:
            return self._head
        return self._head_of(layers)

    def _head_input(self, layers: FusedLayers | DeviceLayers | None) -> Tensor:
        """What the head multiplies of the layers' base, [P, N, D]."""
        if layers is None:
            return self._model_layers.head_input(self._model_layers.base(len(self.decoder.layers)))
        everyone, first = range(len(self.probes)), self.probes.prefix - 1
        return layers.head_input(None, layers.exact, everyone, first, layers.positions)

    def afresh(self) -> Evaluator:
        """The same evaluator of the model as it is now, after its weights were changed; without a calibration.

        Raises:
            ModelError: as the class.
        """
        memory, layers = self._given
        return Evaluator(self.model, self.probes, memory=memory, layers=layers)

    def rebased(
        self,
        configuration: Configuration,
        *,
        memory: int | None = None,
        instead_of: Evaluator | None = None,
    ) -> Evaluator:
        """An evaluator that reaches FDT from the states of ``configuration`` instead of the model's.

        It gives the same FDT, sooner for configurations that differ from this one in a few components: the step of a
        beam search, whose candidates extend one that is chosen. What ``first_margin`` says there may differ by the
        arithmetic's error. Metrics beyond FDT are computed as before.

        Args:
            configuration: whose states to keep; its components' inputs are not treated.
            memory: bytes that these states may take; by default as many as the model's own were given, or else half of
                what is free.
            instead_of: an evaluator made by this method that is not needed any more: its states' memory is used again,
                which saves the system clearing as much, and it starts from the model's states again.

        Raises:
            ValueError: there are no layers of our own (``engine`` says why), or they do not know a treatment, or
                instead_of is of other probes or another model.
            ComponentError, TreatmentError: the configuration does not fit the model.
        """
        if self._layers is None or self._first is None:
            raise ValueError(f"only layers of our own can start from other states; here run {self.engine}")
        check_configuration(self.decoder, configuration)
        for path, treatment in configuration.items():
            if not self._layers.can_run_in_parts({path: treatment}):
                raise ValueError(f"layers of our own do not know {treatment.key} of {path}")
        other = copy.copy(self)
        of_the_model = self._layers.of_the_model
        rooms = [] if instead_of is None else instead_of._states_given_up(of_the_model)
        if memory is None:
            memory = self._given[0]
        if memory is None:
            memory = (free_memory(self.model.device) + sum(each.nbytes for each in rooms)) // 2
        other._layers = of_the_model.rebased(configuration, memory, rooms)
        other._first = FirstPass(
            other._layers, self._part_head(other._layers), self.probes.prefix, self._scale
        )
        return other

    def _states_given_up(self, of_the_model: FusedLayers | DeviceLayers) -> list[States]:
        """Starts from the model's states again, which are these, and returns its own to be written over."""
        if self._layers is None or self._layers.of_the_model is not of_the_model:
            raise ValueError("instead_of was not made from this evaluator")
        if self._layers is of_the_model:
            return []
        states = self._layers.states_given_up()
        self._layers = of_the_model
        self._first = FirstPass(of_the_model, self._part_head(of_the_model), self.probes.prefix, self._scale)
        return states

    @property
    def can_race(self) -> bool:
        """Whether ``best`` can be asked, which needs layers of our own (``engine`` says why there are none)."""
        return self._first is not None

    @property
    def computes_as_the_model(self) -> bool:
        """Whether its layers are transformers' own; others round otherwise, which in half precision can be seen."""
        return self._layers is None

    @property
    def layer_evaluations(self) -> int:
        """Layers of configurations run so far; those that several share are counted once, the base's not at all."""
        return self._complete.layer_evaluations + (self._first.layer_evaluations if self._first else 0)

    @cached_property
    def floor(self) -> Floor:
        """How far the base diverges from itself under another batch shape, or under this evaluator's own layers."""
        floor = self_divergence(self.model, self.probes)
        if self._layers is None or self._head is None:
            return floor
        if isinstance(self._layers, DeviceLayers):  # whose base is the model's own states
            moved = self._layers.of_the_model.base_by_itself(self.probes.prefix)
        else:
            moved = self._head_input(None)
        return replace(floor, margin=max(floor.margin, self._head.largest_move(moved)))

    def measure(
        self, configurations: Iterable[Configuration], metrics: Sequence[str] = ("sdt",)
    ) -> list[Measurement]:
        """The measurement of each configuration, in order; arguments and errors as ``iterate``."""
        wanted = list(several(configurations))
        found = dict(self._measured(wanted, metrics))
        return [found[index] for index in range(len(wanted))]

    def iterate(
        self, configurations: Iterable[Configuration], metrics: Sequence[str] = ("sdt",)
    ) -> Iterator[Measurement]:
        """Measures the configurations in the order that shares most, and hands each over as it is done.

        Args:
            configurations: ``{}`` is the model as it is.
            metrics: what to measure beyond FDT: ``"sdt"`` and names of ``EXTRA_METRICS``. Without any, a probe is left
                as soon as it diverges, and a float32 model is computed by differences to the base where these decide.

        Raises:
            ComponentError, TreatmentError: a configuration does not fit the model; nothing is measured then.
            NotFiniteError: configurations give logits that are not finite, and ``configurations`` of it names them;
                raised after all others have been handed over.
            MeasurementError: configurations break the self-test; raised likewise.
            ProbeError: a metric of the prefix where that is one token.
            ValueError: an unknown metric.
        """
        return (measurement for _, measurement in self._measured(list(several(configurations)), metrics))

    def best(
        self,
        configurations: Iterable[Configuration],
        k: int,
        *,
        by: By = "fdt75",
        error: float = 0.0,
        known: Sequence[Measurement | Dropped] = (),
        on_finished: Callable[[Measurement | Dropped], None] = lambda result: None,
    ) -> Race:
        """The k configurations of the largest FDT_75; the others are dropped as soon as they cannot win.

        Equals ``sorted(self.measure(configurations, ()), key=lambda m: (-fdt75(m.fdt), name_of(m.configuration)))[:k]``
        with error 0: of equal FDT_75 the lower name wins. By ``"fdt75+mean"`` mean FDT decides first, and the key is
        ``(-fdt75(m.fdt), -m.fdt.double().mean(), name_of(m.configuration))``.

        Args:
            configurations: candidates; equal ones count once. By ``"fdt75+mean"`` they are read in this order, and
                least is read if the most promising come first.
            k: how many are wanted, a whole number of at least 1.
            by: what decides; FDT_75 alone is N for all that harm few probes.
            error: the probability with which one of the best may be dropped because too few of its probes, taken at
                random, are good.
            known: what earlier races on these probes found of some of the configurations: who was measured is not
                measured again, and who was dropped is read only where the old bound does not suffice; of equal
                configurations one counts, and a measurement before a bound.
            on_finished: called with each other configuration's result before the next is read.

        Raises:
            ValueError: k or error is out of range, by is neither, or there are no layers of our own (``engine`` says
                why), without which nothing is saved.
            ComponentError, TreatmentError, NotFiniteError: as ``iterate``.
        """
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise ValueError(f"k must be a whole number of at least 1, not {k!r}")
        if not 0 <= error < 1:
            raise ValueError(f"error must be in [0, 1), not {error!r}")
        if by not in get_args(By):
            raise ValueError(f"a race is decided by {' or '.join(get_args(By))}, not by {by!r}")
        if self._first is None:
            raise ValueError(f"a race needs layers of our own; here run {self.engine}")
        candidates = {name_of(each): each for each in several(configurations)}
        for configuration in candidates.values():
            check_configuration(self.decoder, configuration)
        known = [each for each in one_each(known) if name_of(each.configuration) in candidates]
        contest = Contest(k, self.probes.margins, error, known, by)
        measured = [each for each in known if isinstance(each, Measurement)]
        for each in measured:
            del candidates[name_of(each.configuration)]
        wanted = list(candidates.values())
        dropped: list[Dropped] = []
        failed: list[tuple[Configuration, MeasurementError]] = []
        clock = time.perf_counter()
        for indices, result in self._results(wanted, frozenset(), contest):
            configuration = wanted[indices[0]]
            now = time.perf_counter()
            seconds, clock = now - clock, now
            if isinstance(result, MeasurementError):
                failed.append((configuration, result))
            elif isinstance(result, Dropped):
                dropped.append(result)
                on_finished(result)
            else:
                found = _measurement(configuration, self.probes.completion, result, seconds)
                measured.append(replace(found, sdt=None))  # only the base has any, by its complete pass
                on_finished(measured[-1])
        _raise_if_any(failed)
        measured.sort(key=lambda each: place(standing(each.fdt), name_of(each.configuration), by))
        for each in measured[k:]:
            seen = torch.minimum(each.fdt + 1, torch.tensor(each.completion))
            first, mean = standing(each.fdt)
            dropped.append(Dropped(each.configuration, first, seen, proved=True, highest_mean=mean))
        return Race(measured[:k], dropped)

    def _measured(
        self, configurations: Sequence[Configuration], metrics: Sequence[str]
    ) -> Iterator[tuple[int, Measurement]]:
        wanted = checked_metrics(metrics, self.probes)
        for configuration in configurations:
            check_configuration(self.decoder, configuration)
        failed: list[tuple[Configuration, MeasurementError]] = []
        clock = time.perf_counter()
        for indices, result in self._results(configurations, wanted):
            configuration = configurations[indices[0]]
            try:
                if isinstance(result, MeasurementError):
                    raise result
                assert not isinstance(result, Dropped), "there is no contest"
                now = time.perf_counter()
                seconds, clock = (now - clock) / len(indices), now
                measurement = _measurement(configuration, self.probes.completion, result, seconds)
                measurement = measurement if wanted else replace(measurement, sdt=None)
            except MeasurementError as error:
                failed.append((configuration, error))
                continue
            for index in indices:
                yield index, replace(measurement, configuration=configurations[index])
        _raise_if_any(failed)

    def _results(
        self,
        configurations: Sequence[Configuration],
        metrics: frozenset[str],
        contest: Contest | None = None,
    ) -> Results:
        if metrics or self._first is None:
            yield from self._complete.results(configurations, metrics)
            return
        # The base's own text is what the model's own pass chooses: no other arithmetic is asked.
        base = [index for index, configuration in enumerate(configurations) if not configuration]
        if base:
            for _, result in self._complete.results([{}], metrics):
                if contest is not None and not isinstance(result, MeasurementError):
                    # It is N only where the probes were written as the model reads here, and a race is won by proof.
                    contest.take({}, _measurement({}, self.probes.completion, result, 0.0).fdt)
                yield base, result
        others = [index for index, configuration in enumerate(configurations) if configuration]
        for indices, rest in self._first.results([configurations[i] for i in others], contest):
            yield [others[index] for index in indices], rest


def _raise_if_any(failed: list[tuple[Configuration, MeasurementError]]) -> None:
    """What broke a law before what has no number."""
    if not failed:
        return
    configuration, error = min(failed, key=lambda each: isinstance(each[1], NotFiniteError))
    more = f" (and {len(failed) - 1} more configurations failed)" if len(failed) > 1 else ""
    message = f"{describe(configuration)}: {error}{more}"
    if isinstance(error, NotFiniteError):
        raise NotFiniteError(message, [each for each, _ in failed])
    raise MeasurementError(message)


def _measurement(
    configuration: Configuration, completion: int, columns: Columns, seconds: float
) -> Measurement:
    if "fdt" in columns:
        return Measurement.of_first(configuration, completion, columns["fdt"], columns["first_lead"], seconds)
    return Measurement.of(configuration, seconds=seconds, **columns)
