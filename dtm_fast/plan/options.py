"""What a search may do to each unit, and how large the whole then is."""

import math
from collections.abc import Callable, Iterable, Sequence
from math import prod
from typing import TypeAlias

from dtm_fast.compression import (
    Configuration,
    Treatment,
    configuration_bits,
    key_of,
    shapes_of,
)
from dtm_fast.compression.treatment import KEPT_BITS
from dtm_fast.errors import InputError, TreatmentError
from dtm_fast.model import Decoder
from dtm_fast.plan.knapsack import Option, choose
from dtm_fast.plan.units import Unit

Choice: TypeAlias = Treatment | None
"""What is done to a unit; None: it is kept."""


class Options:
    """Units, each of which is kept or gets one of some treatments.

    Args:
        decoder: of the model.
        treatments: which may be chosen; equal ones count once.
        units: what is treated together (``plan.units``).

    Raises:
        InputError: no treatment.
        ComponentError, TreatmentError: a treatment does not fit a component. Whether there is the calibration that it
            needs is seen where it is measured.
    """

    def __init__(self, decoder: Decoder, treatments: Iterable[Treatment], units: Sequence[Unit]) -> None:
        """Measures nothing."""
        self.units = units
        self.treatments = list({treatment.key: treatment for treatment in treatments}.values())
        if not self.treatments:
            raise InputError("treatments: at least one")
        inside = [path for unit in units for path in unit]
        check_shapes(decoder, self.treatments, inside)
        self.choices: list[Choice] = [None, *self.treatments]
        self._shapes = shapes_of(decoder)
        self._weights = sum(map(prod, self._shapes.values()))
        outside = {path: shape for path, shape in self._shapes.items() if path not in set(inside)}
        self._outside = configuration_bits(outside, {})

    def bits(self, unit: Unit, choice: Choice) -> int:
        """Bits that a unit takes."""
        shapes = {path: self._shapes[path] for path in unit}
        return configuration_bits(shapes, {} if choice is None else dict.fromkeys(unit, choice))

    def bits_of(self, configuration: Configuration) -> int:
        """Bits that all units take."""
        return configuration_bits(self._shapes, configuration) - self._outside

    @property
    def smallest(self) -> int:
        """The fewest bits that the units can take."""
        return sum(min(self.bits(unit, each) for each in self.choices) for unit in self.units)

    def limit(self, budget: float) -> int:
        """The bits that a budget, in bits for each weight of all components, leaves for the units.

        Raises:
            InputError: it cannot be meant, or not be reached; then the message names the smallest that can.
        """
        check_budgets([budget])
        smallest = self._outside + self.smallest
        if budget * self._weights < smallest:
            # Rounded up, so that what the message names can be asked for.
            least = math.ceil(smallest / self._weights * 1000) / 1000
            raise InputError(
                f"budget: {budget:g} effective bits cannot be reached; the smallest that these treatments reach "
                f"is {least:g}"
            )
        return math.floor(budget * self._weights) - self._outside

    def alone(self) -> list[Configuration]:
        """Every unit alone under every treatment, unit by unit."""
        return [dict.fromkeys(unit, each) for unit in self.units for each in self.treatments]

    def least_harmful(self, limit: int, harm: Callable[[Unit, Choice], float]) -> Configuration:
        """The configuration of at most ``limit`` bits whose harms add up to least (``plan.knapsack``)."""
        rows = [
            [Option(self.bits(unit, each), harm(unit, each)) for each in self.choices] for unit in self.units
        ]
        picked = choose(rows, limit)
        return self.assembled([self.choices[index] for index in picked])

    def assembled(self, choices: Sequence[Choice]) -> dict[str, Treatment]:
        """The configuration that has these, one for each unit."""
        return {
            path: choice
            for unit, choice in zip(self.units, choices, strict=True)
            if choice is not None
            for path in unit
        }

    def neighbours(self, unit: Unit, own: Choice) -> list[Choice]:
        """``own`` first, then the next smaller and the next larger choice, as far as there are any."""
        order = sorted(self.choices, key=lambda each: (self.bits(unit, each), key_of(each)))
        place = [key_of(each) for each in order].index(key_of(own))
        return [own, *order[max(0, place - 1) : place], *order[place + 1 : place + 2]]


def check_budgets(budgets: Sequence[float]) -> None:
    """Raises InputError for a budget that no model can need: it is below 0, or above what a kept weight takes."""
    for budget in budgets:
        if not 0 <= budget <= KEPT_BITS:
            raise InputError(
                f"budget: 0 to {KEPT_BITS} effective bits, those of the model as it is, not {budget:g}"
            )


def check_shapes(decoder: Decoder, treatments: Iterable[Treatment], paths: Iterable[str]) -> None:
    """Raises ComponentError or TreatmentError unless each treatment fits each component, calibrated or not."""
    components = [decoder.component(path) for path in paths]
    for treatment in treatments:
        for component in components:
            try:
                treatment.check_shape(*component.shape)
            except TreatmentError as error:
                raise TreatmentError(f"{component.path}: {error}") from None
