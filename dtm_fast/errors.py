"""The exceptions that dtm_fast raises for input it cannot use; each message is one line that names it."""

from collections.abc import Mapping, Sequence
from typing import Any


class InputError(ValueError):
    """Something the caller gave cannot be used; the command line ends with exit code 2."""


class ModelError(InputError):
    """A model or tokenizer that cannot be loaded, or is not what it should be."""


class ProbeError(InputError):
    """A text, a prefix length or a completion length that gives no probes."""


class ComponentError(InputError):
    """A component that the model does not have."""


class TreatmentError(InputError):
    """A treatment that does not exist or does not fit the component."""


class RunError(InputError):
    """A run directory that cannot be used: another model's, damaged, in use, or not writable."""


class MeasurementError(ArithmeticError):
    """A measurement that broke a law it must obey, or for which there is no room."""


class NotFiniteError(MeasurementError):
    """Logits, or a component's input, that are NaN or infinite: there is no next token.

    Attributes:
        configurations: under which; each maps components to treatments.
    """

    def __init__(self, message: str, configurations: Sequence[Mapping[str, Any]] = ()) -> None:
        """``message``: one line."""
        super().__init__(message)
        self.configurations = tuple(configurations)


class TrainingError(ArithmeticError):
    """A training in which a loss, a gradient or a weight was no longer finite."""
