"""Checkpoints of a training: folders of safetensors and JSON, each of which is there whole or not at all."""

import fcntl
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.optim import Optimizer

from dtm_fast.errors import RunError
from dtm_fast.model.soundness import first_line

_NAME = re.compile(r"checkpoint-(\d+)")
_UNFINISHED = ".unfinished-"
_WEIGHTS, _OPTIMIZER, _LOSSES = "weights.safetensors", "optimizer.safetensors", "losses.json"


def save_checkpoint(
    folder: Path, weights: Mapping[str, nn.Parameter], optimizer: Optimizer, losses: list[float]
) -> None:
    """Writes ``folder/checkpoint-STEP``, STEP = len(losses); once it is durable the older ones are removed.

    Args:
        folder: exists, and no other process writes into it.
        weights: name → what is trained; each tensor of the optimizer's state is kept as ``NAME/KEY``.
        optimizer: of these weights.
        losses: of all steps so far.

    Raises:
        RunError: it cannot be written; the one before is still there.
    """
    state = {
        f"{name}/{key}": tensor.contiguous()
        for name, weight in weights.items()
        for key, tensor in optimizer.state.get(weight, {}).items()
    }

    def write(unfinished: Path) -> None:
        save_file(
            {name: weight.detach().contiguous() for name, weight in weights.items()}, unfinished / _WEIGHTS
        )
        save_file(state, unfinished / _OPTIMIZER)
        (unfinished / _LOSSES).write_text(json.dumps(losses))

    older = _checkpoints(folder)
    write_folder(folder / f"checkpoint-{len(losses)}", write)
    for path in older:
        shutil.rmtree(path, ignore_errors=True)


def latest_checkpoint(folder: Path) -> Path | None:
    """The last one that was written whole."""
    return max(_checkpoints(folder), key=_step, default=None)


def load_weights(checkpoint: Path, weights: Mapping[str, nn.Parameter]) -> None:
    """Copies the weights of a checkpoint into those of the model, one by one.

    Raises:
        RunError: it is damaged.
    """
    with _reading(checkpoint), safe_open(checkpoint / _WEIGHTS, framework="pt") as stored:
        for name, weight in weights.items():
            weight.detach().copy_(stored.get_tensor(name))


def load_checkpoint(
    checkpoint: Path, weights: Mapping[str, nn.Parameter], optimizer: Optimizer
) -> list[float]:
    """Puts the model and a new optimizer in the state of ``save_checkpoint``, and returns the losses.

    Raises:
        RunError: it is damaged.
    """
    load_weights(checkpoint, weights)
    with _reading(checkpoint), safe_open(checkpoint / _OPTIMIZER, framework="pt") as stored:
        for entry in stored.keys():  # noqa: SIM118 - no mapping
            name, _, key = entry.rpartition("/")
            # A number, such as the count of steps, stays on the CPU; the copy lets go of the file.
            tensor = stored.get_tensor(entry).clone()
            optimizer.state[weights[name]][key] = tensor.to(weights[name].device) if tensor.dim() else tensor
        losses: list[float] = json.loads((checkpoint / _LOSSES).read_text())
    return losses


def remove_checkpoints(folder: Path) -> None:
    """Removes all of them: the training is finished."""
    for path in _checkpoints(folder):
        shutil.rmtree(path, ignore_errors=True)


def write_folder(folder: Path, write: Callable[[Path], object]) -> None:
    """``folder`` appears with all that ``write`` puts into the empty one it is given, and stays after a power cut.

    Of several processes that write the same one, the first to end has written it.

    Raises:
        RunError: it cannot be written, or is there with something in it; then nothing of this is left.
    """
    try:
        with _unfinished_one(folder) as unfinished:
            try:
                write(unfinished)
                allowed = unfinished.stat().st_mode & 0o666  # by the umask
                for path in (*unfinished.rglob("*"), unfinished):
                    if path.is_file():  # safetensors writes for the owner alone
                        path.chmod(allowed)
                    make_durable(path)
                unfinished.rename(folder)
            except BaseException:
                shutil.rmtree(unfinished, ignore_errors=True)
                raise
        make_durable(folder.parent)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{folder}: cannot be written: {first_line(error)}") from error


@contextmanager
def _unfinished_one(folder: Path) -> Iterator[Path]:
    """An empty folder beside ``folder`` that is this process's own; those of processes that were killed are removed."""
    name = _UNFINISHED + folder.name
    with ExitStack() as held:
        with ExitStack() as meanwhile:  # nobody else makes or removes any
            with suppress(OSError):  # a file system without locks
                _lock(meanwhile, folder.parent, fcntl.LOCK_EX)
            for path in folder.parent.iterdir():
                if re.fullmatch(re.escape(name) + "(-[0-9a-f]{8})?", path.name):
                    with ExitStack() as trying, suppress(OSError):
                        _lock(trying, path, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        shutil.rmtree(path, ignore_errors=True)
            own = folder.with_name(f"{name}-{secrets.token_hex(4)}")
            own.mkdir()
            with suppress(OSError):
                _lock(held, own, fcntl.LOCK_EX)
        yield own


def _lock(held: ExitStack, folder: Path, how: int) -> None:
    """Held until ``held`` is left, or the process ends in whatever way. Raises OSError where another one has it."""
    handle = os.open(folder, os.O_RDONLY)
    held.callback(os.close, handle)
    fcntl.flock(handle, how)


def is_checkpoint(name: str) -> bool:
    """Whether a folder of this name holds a state of a training that goes on, not what came of one."""
    return name.startswith(_UNFINISHED) or _NAME.fullmatch(name) is not None


def make_durable(path: Path) -> None:
    """Returns once the file, or the names in the folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _checkpoints(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if _NAME.fullmatch(path.name)]


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


@contextmanager
def _reading(checkpoint: Path) -> Iterator[None]:
    """What cannot be read as one line that says what to do."""
    try:
        yield
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise RunError(
            f"{checkpoint}: the checkpoint cannot be read: {first_line(error)}; "
            f"delete {checkpoint.parent} to start anew"
        ) from error
