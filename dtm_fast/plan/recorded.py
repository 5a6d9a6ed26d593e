"""An evaluator whose finished measurements are in a journal before the next begins."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

from dtm_fast.compression import Configuration, configuration_identity
from dtm_fast.measure import Floor, Measurement, Probes
from dtm_fast.model import Decoder
from dtm_fast.runs import Journal

OnFinished = Callable[[Measurement, bool], None]


class Evaluator(Protocol):
    """What a search needs of an evaluator; ``ReferenceEvaluator`` is one."""

    decoder: Decoder
    probes: Probes

    @property
    def floor(self) -> Floor:
        """The base's divergence from itself."""
        ...

    def iterate(
        self, configurations: Iterable[Configuration], metrics: Sequence[str] = ...
    ) -> Iterator[Measurement]:
        """Measures one configuration after the other."""
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
        self._journal = journal
        self._on_finished = on_finished

    def measure(
        self, configurations: Iterable[Configuration], metrics: Sequence[str] = ("dppl",)
    ) -> list[Measurement]:
        """The measurement of each configuration, in order, each committed as soon as it is finished."""
        wanted = list(configurations)
        identities = [configuration_identity(configuration) for configuration in wanted]
        found: dict[str, Measurement] = {}
        for identity in identities:
            stored = self._journal.find(identity, list(metrics))
            if stored is not None and identity not in found:
                found[identity] = Measurement.from_json(stored)
                self._on_finished(found[identity], True)
        missing = {
            identity: configuration
            for identity, configuration in zip(identities, wanted, strict=True)
            if identity not in found
        }
        for measurement in self.evaluator.iterate(missing.values(), metrics):
            identity = configuration_identity(measurement.configuration)
            self._journal.add(identity, list(metrics), measurement.to_json())
            found[identity] = measurement
            self._on_finished(measurement, False)
        return [found[identity] for identity in identities]
