"""Weights, and inputs as they arrive, to int8 and back."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dtm_fast import ops
from dtm_fast.compression.treatment import Treatment
from dtm_fast.errors import NotFiniteError, TreatmentError
from dtm_fast.model import InputStatistics


def _int8_round_trip(x: Tensor) -> Tensor:
    """``x`` to int8 per row and back, in x's dtype."""
    qx, scale = ops.quantize_int8(x)
    return (qx.float() * scale.unsqueeze(-1)).to(x.dtype)


def _input_round_trip(x: Tensor) -> Tensor:
    """The same of a component's input, where what is not finite ends the measurement."""
    try:
        return _int8_round_trip(x)
    except ValueError as error:
        raise NotFiniteError(f"the input of a component cannot be quantized: {error}") from error


@dataclass(frozen=True)
class Int8(Treatment):
    """Weights to int8: symmetric AbsMax, one scale per output channel (``ops.quantize_int8``).

    Source: Deiseroth et al. 2023 (papers.md §1.7), "naive AbsMax"; granularity per design.md, decision 6.
    """

    @property
    def key(self) -> str:
        """``int8``."""
        return "int8"

    def compress(self, weight: Tensor, inputs: InputStatistics | None = None) -> Tensor:
        """``(qweight * scale[:, None]).to(weight.dtype)``."""
        return _int8_round_trip(weight)

    def bits(self, n: int, k: int) -> int:
        """8 for each weight and 32 for each channel's scale."""
        return 8 * n * k + 32 * n


@dataclass(frozen=True)
class W8A8(Int8):
    """Weights as ``Int8``, and the input to int8 per token when it arrives, as ``ops.int8_linear`` computes."""

    @property
    def key(self) -> str:
        """``w8a8``."""
        return "w8a8"

    def compress_input(self, x: Tensor) -> Tensor:
        """Each token's vector to int8 with its own scale, and back.

        Raises:
            NotFiniteError: if it holds a NaN or an infinity.
        """
        return _input_round_trip(x)


@dataclass(frozen=True)
class LLMInt8(Int8):
    """Weights as ``Int8``; of each token's input what is not an outlier to int8 too, as LLM.int8() does.

    LLM.int8() takes for outliers the channels in which any token of the batch reaches the threshold, so that what it
    makes of a token depends on the others. Here each token has its own outliers: this is LLM.int8() of each token
    alone, and a row does not depend on its batch. The weights that outliers meet are int8 as the others, as in
    bitsandbytes when it infers.

    Args:
        threshold: magnitude from which on an entry is an outlier, above 0.

    Source: Dettmers et al. 2022, "LLM.int8()", section 3.2 and threshold 6 (papers.md §1.7: the paper's baseline).
    """

    threshold: float = 6.0

    def __post_init__(self) -> None:
        """Refuses a threshold that is not a finite number above 0."""
        if isinstance(self.threshold, bool) or not isinstance(self.threshold, (int, float)):
            raise TreatmentError(f"LLMInt8: threshold must be a number, not {self.threshold!r}")
        if not 0 < self.threshold < math.inf:
            raise TreatmentError(f"LLMInt8: threshold must be finite and above 0, not {self.threshold!r}")

    @property
    def key(self) -> str:
        """``llm_int8``, or ``llm_int8(5.0)`` where the threshold is not 6."""
        return "llm_int8" if self.threshold == 6 else f"llm_int8({float(self.threshold)!r})"

    def compress_input(self, x: Tensor) -> Tensor:
        """``torch.where(x.abs() >= threshold, x, rest)``, rest being the others to int8 and back, per token.

        Raises:
            NotFiniteError: if it holds a NaN or an infinity.
        """
        outlier = (x.abs() >= self.threshold) & x.isfinite()  # an infinity goes where it is refused
        return torch.where(outlier, x, _input_round_trip(x.masked_fill(outlier, 0)))
