"""Which files of a Hugging Face folder hold the weights, and what their headers say."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from safetensors import SafetensorError, safe_open
from torch import Tensor

from dtm_fast.errors import ModelError
from dtm_fast.model.soundness import first_line

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of a tensor: dtype as it spells it (``"I8"``, ``"F32"``), shape, and the file."""

    dtype: str
    shape: tuple[int, ...]
    file: Path


Headers: TypeAlias = Mapping[str, Header]


def weight_files(folder: Path) -> list[Path]:
    """The files that the index names, or the one file where there is no index.

    Raises:
        ModelError: one of them is not there, or the index cannot be read.
    """
    index = folder / INDEX
    names = [SINGLE]
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{index}: cannot be read: {first_line(error)}") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not (folder / name).is_file():
            raise ModelError(f"{folder}: the weights are not there: no {name}")
    return [folder / name for name in names]


def read_headers(folder: Path) -> dict[str, Header]:
    """Every tensor of the checkpoint.

    Raises:
        ModelError: a file is missing, damaged or truncated.
    """
    headers: dict[str, Header] = {}
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt") as stored:
                for name in stored.keys():  # noqa: SIM118 - no mapping
                    part = stored.get_slice(name)
                    headers[name] = Header(part.get_dtype(), tuple(part.get_shape()), file)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file}: damaged or truncated: {first_line(error)}") from error
    return headers


def read_tensors(headers: Headers) -> dict[str, Tensor]:
    """All tensors, on the CPU."""
    tensors: dict[str, Tensor] = {}
    for file in sorted({header.file for header in headers.values()}):
        with safe_open(file, framework="pt") as stored:
            tensors |= {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - no mapping
    return tensors


def write_index(folder: Path) -> None:
    """Names ``model.safetensors`` as the only file with weights, unless the folder has an index already."""
    if (folder / INDEX).exists():
        return
    with (folder / SINGLE).open("rb") as stream:
        header = 8 + int.from_bytes(stream.read(8), "little")
    content = {
        "metadata": {"total_size": (folder / SINGLE).stat().st_size - header},
        "weight_map": dict.fromkeys(read_headers(folder), SINGLE),
    }
    (folder / INDEX).write_text(json.dumps(content, indent=2) + "\n")
