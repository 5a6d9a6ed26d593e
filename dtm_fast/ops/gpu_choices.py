"""What was measured to be fastest on a GPU: the order in which backend=None tries the backends.

One file of gpu_choices/ per kind of GPU, written by `python -m benchmarks.cuda` from the medians that it measured
there. A GPU without a file of its own has the choices of one of its compute capability.
"""

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).with_name("gpu_choices")
UNMEASURED = ("cuda", "reference")
"""The order on a GPU of which nothing is known: the CUDA kernels have run on others, Triton's are compiled for each."""


@dataclass(frozen=True)
class Choices:
    """The file of one kind of GPU.

    Attributes:
        device: its name.
        capability: its compute capability, "9.0".
        source: the benchmark's result, from which the choices come.
        rows: operation, dtype, most_tokens (None: any number), ranking; the first that fits holds.
    """

    device: str
    capability: str
    source: str
    rows: tuple[dict[str, Any], ...]


@functools.cache
def known() -> tuple[Choices, ...]:
    """All files, by name."""
    found = []
    for file in sorted(FOLDER.glob("*.json")):
        content = json.loads(file.read_text())
        found.append(Choices(**{**content, "rows": tuple(content["rows"])}))
    return tuple(found)


def ranking(
    operation: str, device: int, dtype: torch.dtype | None = None, tokens: int | None = None
) -> tuple[tuple[str, ...], str]:
    """The backends in the order of their speed, and where that order comes from.

    Args:
        operation: as backends.OPERATIONS has it.
        device: index of the GPU; where torch sees none, nothing is known of it.
        dtype: of the activations; None: bfloat16.
        tokens: rows of activations; None: many.
    """
    if not torch.cuda.is_available():
        return UNMEASURED, "no GPU is there to choose for"
    name = torch.cuda.get_device_name(device)
    capability = "{}.{}".format(*torch.cuda.get_device_capability(device))
    of_name = [each for each in known() if each.device == name]
    for choices in of_name or [each for each in known() if each.capability == capability]:
        for row in choices.rows:
            fits = row["operation"] == operation and row["dtype"] == str(
                dtype or torch.bfloat16
            ).removeprefix("torch.")
            most = row["most_tokens"]
            if fits and (most is None or (tokens is not None and tokens <= most)):
                up_to = "" if most is None else f", up to {most} tokens"
                return tuple(row["ranking"]), f"measured on {choices.device}{up_to} ({choices.source})"
    return UNMEASURED, f"not measured on {name}"
