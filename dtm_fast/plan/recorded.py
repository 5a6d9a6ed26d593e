"""An evaluator whose finished measurements are in a journal before the next begins."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

from dtm_fast.compression import Configuration, configuration_identity
from dtm_fast.errors import InputError, NotFiniteError
from dtm_fast.measure import Evaluator as FastEvaluator
from dtm_fast.measure import Measurement, Probes
from dtm_fast.measure.racing import By, Dropped, Race
from dtm_fast.model import Decoder
from dtm_fast.runs import Journal

OnFinished = Callable[[Measurement, bool], None]


class Evaluator(Protocol):
    """What a search needs of an evaluator; ``ReferenceEvaluator`` is one."""

    decoder: Decoder
    probes: Probes

    def iterate(
        self, configurations: Iterable[Configuration], metrics: Sequence[str] = ...
    ) -> Iterator[Measurement]:
        """Measures one configuration after the other."""
        ...

    def afresh(self) -> "Evaluator":
        """The same evaluator of the model as it is now, after its weights were changed."""
        ...


class RecordedEvaluator:
    """Takes from the journal what it has and measures only the rest.

    Args:
        evaluator: measures.
        journal: keeps.
        on_finished: called after each measurement with it and whether it came from the journal.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        journal: Journal,
        on_finished: OnFinished = lambda measurement, known: None,
    ) -> None:
        """Nothing is measured yet."""
        self.evaluator = evaluator
        self.decoder = evaluator.decoder
        self.journal = journal
        self._on_finished = on_finished

    @property
    def model_identity(self) -> str:
        """What the journal says the model is; empty where it says nothing."""
        return str(self.journal.identity.get("model", ""))

    def measure(
        self, configurations: Iterable[Configuration], metrics: Sequence[str] = ("sdt",)
    ) -> list[Measurement]:
        """The measurement of each configuration, in order, each committed as soon as it is finished.

        Where logits are not finite it is ``Measurement.of_nothing``: a search goes on and chooses others.

        Raises:
            NotFiniteError: the base's own logits are not finite.
            ComponentError, TreatmentError, MeasurementError, ProbeError, ValueError: as ``Evaluator.iterate``.
        """
        wanted = list(configurations)
        identities = [configuration_identity(configuration) for configuration in wanted]
        found: dict[str, Measurement] = {}
        for identity in identities:
            stored = self.journal.find(identity, list(metrics))
            if stored is not None and identity not in found:
                found[identity] = Measurement.from_json(stored)
                self._on_finished(found[identity], True)
        missing = {
            identity: configuration
            for identity, configuration in zip(identities, wanted, strict=True)
            if identity not in found
        }
        while missing:
            for measurement in self._finished(missing.values(), metrics):
                identity = configuration_identity(measurement.configuration)
                self._commit(identity, metrics, measurement)
                found[identity] = measurement
                del missing[identity]
        return [found[identity] for identity in identities]

    def _finished(
        self, configurations: Iterable[Configuration], metrics: Sequence[str]
    ) -> Iterator[Measurement]:
        """The measurements until one fails, then what is to be said of those that have no finite logits."""
        try:
            yield from self.evaluator.iterate(list(configurations), metrics)
        except NotFiniteError as error:
            yield from self._of_nothing(error, metrics)

    def _of_nothing(self, error: NotFiniteError, metrics: Sequence[str]) -> list[Measurement]:
        if not error.configurations or not all(error.configurations):
            raise error  # it is the base's
        probes = self.evaluator.probes
        return [
            Measurement.of_nothing(each, len(probes), probes.completion, metrics)
            for each in error.configurations
        ]

    def _commit(self, identity: str, metrics: Sequence[str], measurement: Measurement) -> None:
        held = {*metrics} if measurement.sdt is None else {*metrics, "sdt"}
        self.journal.add(identity, sorted(held), measurement.to_json())
        self._on_finished(measurement, False)

    def rebased(
        self, configuration: Configuration, instead_of: "RecordedEvaluator | None" = None
    ) -> "RecordedEvaluator":
        """One that measures from the states of ``configuration`` (``Evaluator.rebased``), into the same journal.

        FDT is the same from any states, only sooner from near ones. So where the evaluator cannot start from these
        (it is no ``dtm_fast.Evaluator``, it has no layers of its own, or they do not know a treatment) this one itself
        is returned.

        Args:
            configuration: whose states to start from.
            instead_of: what this method returned before and is not needed any more; its states' memory is used again.

        Raises:
            ValueError: instead_of keeps another journal.
            ComponentError, TreatmentError: the configuration does not fit the model.
        """
        if instead_of is not None and instead_of.journal is not self.journal:
            raise ValueError("instead_of was not made from this evaluator: it keeps another journal")
        if not isinstance(self.evaluator, FastEvaluator):
            return self
        replaced = None if instead_of is None else instead_of.evaluator
        try:
            evaluator = self.evaluator.rebased(
                configuration, instead_of=replaced if isinstance(replaced, FastEvaluator) else None
            )
        except InputError:
            raise
        except ValueError:
            return self
        return self.with_evaluator(evaluator, self.journal)

    def with_evaluator(self, evaluator: Evaluator, journal: Journal) -> "RecordedEvaluator":
        """Another evaluator into another journal; the same is told of its measurements."""
        return RecordedEvaluator(evaluator, journal, self._on_finished)

    def best(
        self, configurations: Iterable[Configuration], k: int, *, by: By = "fdt75", error: float = 0.0
    ) -> Race:
        """As ``Evaluator.best``; who is measured or dropped is committed as soon as that is known.

        Whose logits are not finite is ``Measurement.of_nothing``, and among the best only where there are no others.

        Raises:
            NotFiniteError: the base's own logits are not finite.
            ValueError: as ``Evaluator.best``, or the evaluator is another.
        """
        evaluator = self.evaluator
        if not isinstance(evaluator, FastEvaluator):
            raise ValueError(f"a race needs dtm_fast.Evaluator, not {type(self.evaluator).__name__}")
        wanted = list(configurations)
        known: list[Measurement | Dropped] = []
        for identity in {configuration_identity(configuration): None for configuration in wanted}:
            if (stored := self.journal.find(identity, [])) is not None:
                measurement = Measurement.from_json(stored)
                known.append(measurement)
                self._on_finished(measurement, True)
            elif (bound := self.journal.bound(identity)) is not None:
                known.append(Dropped.from_json(bound))

        def commit(result: Measurement | Dropped) -> None:
            identity = configuration_identity(result.configuration)
            known.append(result)
            if isinstance(result, Measurement):
                self._commit(identity, [], result)
            elif result.proved or self.journal.bound(identity) is None:
                self.journal.add_bound(identity, result.to_json())

        while True:
            try:
                return evaluator.best(wanted, k, by=by, error=error, known=list(known), on_finished=commit)
            except NotFiniteError as failure:
                for measurement in self._of_nothing(failure, []):
                    commit(measurement)
