"""The treatments: what can be done to a component's weight, and optionally to its input."""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dtm_fast import ops
from dtm_fast.compression.saliency import SALIENCIES, keep_mask
from dtm_fast.errors import MeasurementError, TreatmentError

KEPT_BITS = 16
"""What a weight takes that no treatment makes smaller: models are deployed in bfloat16 or float16."""


class Treatment(ABC):
    """One way of compressing a component. Equal treatments have equal ``key``; ``parse_treatment`` reads it."""

    @property
    @abstractmethod
    def key(self) -> str:
        """The canonical spelling, as in journals, plans and on the command line: ``prune(0.5)``."""

    @abstractmethod
    def compress(self, weight: Tensor) -> Tensor:
        """The weight after the treatment, dense, as the compressed model would multiply by it.

        Args:
            weight: float [N, K], output channels first; not changed.

        Returns:
            A new tensor of the same shape and dtype.
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


def _int8_round_trip(x: Tensor) -> Tensor:
    """``x`` to int8 per row and back, in x's dtype."""
    qx, scale = ops.quantize_int8(x)
    return (qx.float() * scale.unsqueeze(-1)).to(x.dtype)


@dataclass(frozen=True)
class Int8(Treatment):
    """Weights to int8: symmetric AbsMax, one scale per output channel (``ops.quantize_int8``).

    Source: Deiseroth et al. 2023 (papers.md §1.7), "naive AbsMax"; granularity per design.md, decision 6.
    """

    @property
    def key(self) -> str:
        """``int8``."""
        return "int8"

    def compress(self, weight: Tensor) -> Tensor:
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
            MeasurementError: if it holds a NaN or an infinity.
        """
        try:
            return _int8_round_trip(x)
        except ValueError as error:
            raise MeasurementError(f"the input of a component cannot be quantized: {error}") from error


@dataclass(frozen=True)
class Prune(Treatment):
    """The least salient ``round(sparsity * numel)`` weights of the matrix to zero, unstructured.

    Args:
        sparsity: share of the matrix's weights to drop, in [0, 1].
        saliency: what ranks the weights; ``"magnitude"``.

    Source: Deiseroth et al. 2023 (papers.md §1.5).
    """

    sparsity: float
    saliency: str = "magnitude"

    def __post_init__(self) -> None:
        """Refuses a sparsity outside [0, 1] and an unknown saliency."""
        if isinstance(self.sparsity, bool) or not isinstance(self.sparsity, (int, float)):
            raise TreatmentError(f"Prune: sparsity must be a number, not {self.sparsity!r}")
        if not 0 <= self.sparsity <= 1:
            raise TreatmentError(f"Prune: sparsity must lie in [0, 1], not {self.sparsity!r}")
        if self.saliency not in SALIENCIES:
            raise TreatmentError(f"Prune: saliency {self.saliency!r} is none of {', '.join(SALIENCIES)}")

    @property
    def key(self) -> str:
        """``prune(0.5)``, or ``prune(0.5,<saliency>)`` where that is not magnitude."""
        saliency = "" if self.saliency == "magnitude" else f",{self.saliency}"
        return f"prune({float(self.sparsity)!r}{saliency})"

    def compress(self, weight: Tensor) -> Tensor:
        """``torch.where(mask, weight, 0)``."""
        mask = keep_mask(SALIENCIES[self.saliency](weight), self.sparsity)
        return torch.where(mask, weight, torch.zeros((), dtype=weight.dtype, device=weight.device))

    def bits(self, n: int, k: int) -> int:
        """A bit for each weight and 16 for each that is kept, or 16 for all where that is less."""
        kept = n * k - round(self.sparsity * n * k)
        return min(n * k + KEPT_BITS * kept, KEPT_BITS * n * k)


_PARSERS: dict[str, Callable[..., Treatment]] = {
    "int8": Int8,
    "w8a8": W8A8,
    "prune": lambda sparsity, *saliency: Prune(float(sparsity), *saliency),
}


def parse_treatment(text: str) -> Treatment:
    """The treatment that ``text`` spells: ``int8``, ``w8a8``, ``prune(0.5)``, ``prune(0.5,magnitude)``.

    Raises:
        TreatmentError: if it spells none.
    """
    match = re.fullmatch(r"\s*(\w+)\s*(?:\((.*)\))?\s*", text)
    name, arguments = (match[1].lower(), match[2]) if match else ("", None)
    if name not in _PARSERS:
        raise TreatmentError(f"no treatment {text!r}; known: {', '.join(_PARSERS)}, as in 'prune(0.5)'")
    try:
        return _PARSERS[name](*(a.strip() for a in arguments.split(",")) if arguments else ())
    except TreatmentError:
        raise
    except (TypeError, ValueError):
        raise TreatmentError(f"treatment {text!r}: wrong arguments for {name}") from None
