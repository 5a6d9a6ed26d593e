"""How recovery trainings went: each losses.json below a run directory, typed and checked."""

import re
from dataclasses import dataclass

from dtm_fast.compression.checkpoints import is_checkpoint
from dtm_fast.errors import InputError
from dtm_fast.report.stored import entries, finite, reading, values_in, whole
from dtm_fast.runs import RunDirectory

FILE = "losses.json"


@dataclass(frozen=True)
class Training:
    """One recovery training.

    Attributes:
        name: its folder inside the run directory.
        masked: how many of the steps, the first ones, were with the mask.
        losses: of each step, in nats for each token.
    """

    name: str
    masked: int
    losses: list[float]


def read_trainings(directory: RunDirectory) -> list[Training]:
    """All finished trainings in folders of a run, by the numbers and letters of their names.

    Raises:
        RunError: a losses.json is not what it should be.
    """
    folders = (path.parent.relative_to(directory.path) for path in directory.path.glob(f"*/**/{FILE}"))
    # A training that is not finished keeps its losses with what it goes on from.
    finished = [each.as_posix() for each in folders if not any(map(is_checkpoint, each.parts))]
    return [_training(directory, folder) for folder in sorted(finished, key=_natural)]


def _training(directory: RunDirectory, folder: str) -> Training:
    place = f"{folder}/{FILE}"
    with reading(directory.path / place, "the losses of a training"):
        stored = values_in(directory, place)
        losses = list(map(finite, entries(stored["losses"])))
        masked = whole(stored["masked"])
        if not losses or masked > len(losses):
            raise InputError(f"{masked} of {len(losses)} steps were masked")
        return Training(folder, masked, losses)


def _natural(name: str) -> list[str | int]:
    """``round-2`` before ``round-10``: text and numbers in turns."""
    parts = re.split(r"(\d+)", name)
    return [int(part) if place % 2 else part for place, part in enumerate(parts)]
