"""A component's weight under a treatment; what took long to compute is kept."""

import hashlib
from collections import OrderedDict

import torch
from torch import Tensor

from dtm_fast.compression.treatment import Treatment
from dtm_fast.errors import TreatmentError
from dtm_fast.model import Component, InputStatistics

_Key = tuple[str, str, str]


class KeptWeights:
    """What slow treatments made of weights; those used last stay.

    They are known by the weight's own bytes, the inputs and the treatment, so that a weight that was changed in the
    meantime is another one.

    Args:
        bound: bytes to keep at most.
    """

    def __init__(self, bound: int) -> None:
        """Holds nothing yet."""
        self._bound = bound
        self._size = 0
        self._known: OrderedDict[_Key, Tensor] = OrderedDict()

    def of(self, weight: Tensor, treatment: Treatment, inputs: InputStatistics | None) -> Tensor:
        """``treatment.compress(weight, inputs)``, computed where it is not known; a tensor of the caller's own."""
        key = (_digest(weight), "" if inputs is None else inputs.identity, treatment.key)
        if key not in self._known:
            self._known[key] = treatment.compress(weight, inputs)
            self._size += self._known[key].nbytes
            while self._size > self._bound and len(self._known) > 1:
                self._size -= self._known.popitem(last=False)[1].nbytes
        self._known.move_to_end(key)
        return self._known[key].clone()


# All of SmolLM2-135M in float32 under two treatments.
_KEPT = KeptWeights(2**30)


@torch.no_grad()
def compressed_weight(component: Component, treatment: Treatment) -> Tensor:
    """``treatment.compress(component.weight, component.inputs)``, which slow treatments compute once.

    Args:
        component: treated as its decoder gives it, with the inputs of the decoder's calibration.
        treatment: fits it (``treatment.check``).

    Returns:
        A new tensor [N, K] of the weight's dtype.

    Raises:
        TreatmentError: it cannot be treated after all; the message names the component.
    """
    try:
        if treatment.is_slow:
            return _KEPT.of(component.weight, treatment, component.inputs)
        return treatment.compress(component.weight, component.inputs)
    except ValueError as error:
        raise TreatmentError(f"{component.path}: {error}") from error


def _digest(weight: Tensor) -> str:
    digest = hashlib.sha256(f"{weight.dtype} {tuple(weight.shape)} {weight.device};".encode())
    digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
