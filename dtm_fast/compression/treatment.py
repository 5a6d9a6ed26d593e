"""What a treatment is: one way of compressing a component's weight, and optionally its input."""

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from dtm_fast.errors import TreatmentError
from dtm_fast.model import Component, InputStatistics

KEPT_BITS = 16
"""What a weight takes that no treatment makes smaller: models are deployed in bfloat16 or float16."""


class Treatment(ABC):
    """One way of compressing a component. Equal treatments have equal ``key``; ``parse_treatment`` reads it.

    What it makes of a component depends on the base model alone, on its weight and on the inputs that it has there,
    and not on what else is treated: so configurations can be composed, and what is computed once can be used again.
    """

    is_slow: ClassVar[bool] = False
    """Whether ``compress`` takes so long that ``compressed_weight`` keeps what came of it."""

    @property
    @abstractmethod
    def key(self) -> str:
        """The canonical spelling, as in journals, plans and on the command line: ``prune(0.5)``."""

    @abstractmethod
    def compress(self, weight: Tensor, inputs: InputStatistics | None = None) -> Tensor:
        """The weight after the treatment, dense, as the compressed model would multiply by it.

        Args:
            weight: float [N, K], output channels first; not changed.
            inputs: of the component in the base model; must be there where ``needs_inputs``.

        Returns:
            A new tensor of the same shape and dtype.

        Raises:
            TreatmentError: the weight's shape does not fit, or inputs are missing or of another K.
        """

    @abstractmethod
    def bits(self, n: int, k: int) -> int:
        """Bits of memory that a compressed weight [N, K] takes, scales and masks included."""

    def compress_input(self, x: Tensor) -> Tensor:
        """The component's input after the treatment: ``x`` itself unless activations are treated too.

        Args:
            x: float [..., K].
        """
        return x

    @property
    def treats_input(self) -> bool:
        """Whether ``compress_input`` does anything."""
        return type(self).compress_input is not Treatment.compress_input

    @property
    def needs_inputs(self) -> bool:
        """Whether ``compress`` looks at the component's inputs, so that the model must be calibrated."""
        return False

    def check_shape(self, n: int, k: int) -> None:  # noqa: B027 - to be overridden where not all shapes fit
        """Raises TreatmentError if a weight [N, K] cannot be treated; any can unless a treatment says otherwise."""

    def check(self, component: Component) -> None:
        """Looks whether the component can be treated, without doing it.

        Raises:
            TreatmentError: it cannot; the message names it and says why.
        """
        try:
            self.check_shape(*component.shape)
        except TreatmentError as error:
            raise TreatmentError(f"{component.path}: {error}") from None
        if not self.needs_inputs:
            return
        if component.inputs is None:
            raise TreatmentError(
                f"{component.path}: {self.key} looks at the model's activations: it needs "
                "calibration=Calibration.from_text(model, tokenizer, documents)"
            )
        if component.inputs.count == 0:
            raise TreatmentError(
                f"{component.path}: {self.key} looks at its inputs, and no token of the calibration reached it"
            )

    def inputs_for(self, weight: Tensor, inputs: InputStatistics | None) -> InputStatistics:
        """``inputs``, of which there must be some, of the weight's K; raises TreatmentError otherwise."""
        if inputs is None:
            raise TreatmentError(f"{self.key} needs the statistics of the component's inputs")
        if inputs.width != weight.shape[1]:
            raise TreatmentError(
                f"{self.key}: the inputs have {inputs.width} channels, the weight has K = {weight.shape[1]}"
            )
        return inputs


def key_of(treatment: Treatment | None) -> str:
    """What tells treatments apart; empty for none."""
    return "" if treatment is None else treatment.key
