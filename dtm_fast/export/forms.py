"""The forms in which compressed-tensors stores int8 weights, and which treatment goes into which."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dtm_fast import ops
from dtm_fast.compression import W8A8, Drop, Int8, Prune, SparseGPT, Treatment

INT_QUANTIZED = "int-quantized"
"""int8 ``weight`` [N, K] and ``weight_scale`` [N, 1]; inputs are quantized per token as they arrive."""
PACK_QUANTIZED = "pack-quantized"
"""The same numbers, four to an int32, ``weight_packed`` [N, ceil(K / 4)], and the ``weight_shape`` [2]; inputs stay
as they are. Of the two forms for weights alone the one that vLLM reads: for naive-quantized it knows no int8 scheme."""
MIXED = "mixed-precision"

_FORMS: dict[type[Treatment], str] = {W8A8: INT_QUANTIZED, Int8: PACK_QUANTIZED}
_WEIGHTS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
_INPUTS: dict[str, dict[str, Any] | None] = {
    INT_QUANTIZED: {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True},
    PACK_QUANTIZED: None,
}


def form_of(treatment: Treatment) -> str | None:
    """The form of a weight under ``treatment``; None for a dense one."""
    # No subclasses: what another treatment does beyond these, no form says.
    return _FORMS.get(type(treatment))


def prunes(treatment: Treatment) -> bool:
    """Whether the zeros that ``treatment`` leaves are what it is for."""
    return isinstance(treatment, (Prune, SparseGPT, Drop))


def store(form: str, weight: Tensor) -> dict[str, Tensor]:
    """The tensors of a weight [N, K] in a form, by the name behind the module's; quantized by ``ops.quantize_int8``.

    Scales are float32: vLLM reads them as that, and they lose nothing; transformers rounds them to the model's dtype.
    """
    quantized, scale = ops.quantize_int8(weight)
    tensors = {"weight_scale": scale[:, None]}
    if form == INT_QUANTIZED:
        return {"weight": quantized, **tensors}
    return {"weight_packed": pack(quantized), "weight_shape": torch.tensor(weight.shape), **tensors}


def pack(quantized: Tensor) -> Tensor:
    """int8 [N, K] → int32 [N, ceil(K / 4)]: the numbers + 128, the first in the lowest byte; beyond K zeros."""
    bytes_ = (quantized.short() + 128).to(torch.uint8)
    return F.pad(bytes_, (0, -bytes_.shape[1] % 4)).contiguous().view(torch.int32)


def unpack(packed: Tensor, columns: int) -> Tensor:
    """The inverse of ``pack``."""
    return (packed.contiguous().view(torch.uint8)[:, :columns].short() - 128).to(torch.int8)


def quantization_config(forms: Mapping[str, str], linears: Iterable[str]) -> dict[str, Any]:
    """The ``quantization_config`` of a config.json.

    Args:
        forms: module → its form; at least one.
        linears: all linear modules of the model; those without a form are to be ignored.
    """
    used = sorted(set(forms.values()))
    groups: dict[str, dict[str, Any]] = {}
    # Tools that save a config again sort the keys as text, and the first group that matches counts.
    for index, form in enumerate(used):
        groups[f"group_{index:02}"] = {
            "targets": [module for module, its in forms.items() if its == form],
            "weights": _WEIGHTS,
            "input_activations": _INPUTS[form],
        } | ({"format": form} if len(used) > 1 else {})
    return {
        "quant_method": "compressed-tensors",
        "format": used[0] if len(used) == 1 else MIXED,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [module for module in linears if module not in forms],
    }
