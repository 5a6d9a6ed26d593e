"""How a pruned model is trained: what the paper says of it, and what it leaves open."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from dtm_fast.errors import InputError

_WARM_UP = 0.05  # share of the steps
_LAST_RATE = 0.1  # share of the highest rate


@dataclass(frozen=True)
class Recovery:
    """How a pruned model is trained; the defaults are the paper's where it says.

    Args:
        masked_steps: steps during which dropped weights stay 0.
        unmasked_steps: steps after them, in which they may return.
        batch: sequences a step.
        length: tokens of a sequence.
        weight_decay: AdamW's, of matrices and embeddings; norms and biases have none, as usual for language models.
        learning_rate: the highest. The paper does not say it. 1e-4 is a third of the rate that Llama 2 7B and 13B
            were trained with; 500 steps of AdamW then move a weight by up to 0.03, about a weight's usual size, so
            that those that are left can take over from those that were dropped. Lower it if the loss rises.
        micro_batch: the most sequences that are computed at once; the gradients of a batch are the sum of its
            parts'. It bounds the memory and changes nothing but rounding.
        clip: the longest gradient, as one vector of all weights; a longer one is shortened to it.
        seed: of the order of the sequences.
        checkpoint_every: steps between checkpoints.

    The rate rises in a straight line over the first 5% of all steps to ``learning_rate`` and falls along a cosine to
    a tenth of it at the last. The paper names no optimizer either: AdamW with betas 0.9 and 0.95, the tenth and the
    clipping are those of Llama 2's pretraining. A rate that fell to 0 would leave the unmasked steps nothing to do.

    Raises:
        InputError: a number is out of its range.

    Source: Deiseroth et al. 2023 (papers.md §1.5): steps, batch, length and weight decay.
    """

    masked_steps: int = 450
    unmasked_steps: int = 50
    batch: int = 256
    length: int = 2048
    weight_decay: float = 0.01
    learning_rate: float = 1e-4
    micro_batch: int = 1
    clip: float = 1.0
    seed: int = 0
    checkpoint_every: int = 50

    def __post_init__(self) -> None:
        """Refuses what cannot be trained with."""
        for name, least in (
            ("masked_steps", 0),
            ("unmasked_steps", 0),
            ("batch", 1),
            ("length", 2),
            ("micro_batch", 1),
            ("seed", 0),
            ("checkpoint_every", 1),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InputError(
                    f"Recovery: {name} must be a whole number of at least {least}, not {value!r}"
                )
        if not self.steps:
            raise InputError("Recovery: masked_steps and unmasked_steps are both 0")
        ranges: tuple[tuple[str, Callable[[float], bool], str], ...] = (
            ("weight_decay", lambda value: value >= 0, "of at least 0"),
            ("learning_rate", lambda value: 0 < value <= 1, "above 0 and at most 1"),
            ("clip", lambda value: value > 0, "above 0"),
        )
        for name, fits, said in ranges:
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if not number or not fits(value):
                raise InputError(f"Recovery: {name} must be a finite number {said}, not {value!r}")

    @property
    def steps(self) -> int:
        """All steps."""
        return self.masked_steps + self.unmasked_steps

    def rate_at(self, step: int) -> float:
        """The learning rate of a step, from 0."""
        rising = max(1, round(_WARM_UP * self.steps))
        if step < rising:
            return self.learning_rate * (step + 1) / rising
        done = (step + 1 - rising) / (self.steps - rising)
        cosine = (1 + math.cos(math.pi * done)) / 2
        return self.learning_rate * (_LAST_RATE + (1 - _LAST_RATE) * cosine)
