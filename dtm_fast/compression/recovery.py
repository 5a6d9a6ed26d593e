"""Training between pruning rounds: the weights that are left learn to do without those that were dropped."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.optim import AdamW

from dtm_fast.compression.accelerated import is_accelerated
from dtm_fast.compression.checkpoints import (
    latest_checkpoint,
    load_checkpoint,
    load_weights,
    make_durable,
    remove_checkpoints,
    save_checkpoint,
    write_folder,
)
from dtm_fast.compression.configuration import Configuration, check_configuration, configuration_identity
from dtm_fast.compression.pruning import Drop, Prune
from dtm_fast.compression.recovery_settings import Recovery
from dtm_fast.compression.treatment import Treatment
from dtm_fast.errors import InputError, ModelError, RunError, TrainingError, TreatmentError
from dtm_fast.model import Decoder, model_identity
from dtm_fast.model.soundness import check_storable, first_line
from dtm_fast.runs import RunDirectory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MODEL, _LOSSES = "model", "losses.json"
_BETAS = (0.9, 0.95)


@dataclass(frozen=True)
class Recovered:
    """What came of a recovery training.

    Attributes:
        masked: how many of the steps, the first ones, were with the mask.
        losses: of each step, the mean cross entropy in nats of its batch's next tokens, before its update.
        model: the folder of the trained model, as ``save_pretrained`` writes it; a tokenizer is not in it.
    """

    masked: int
    losses: list[float]
    model: Path


def recover(
    model: PreTrainedModel, configuration: Configuration, tokens: Tensor, settings: Recovery, folder: Path
) -> Recovered:
    """Prunes the model in place and trains all its weights, at first with the mask held, then without.

    Equals ``loss = F.cross_entropy(model(batch[:, :-1]).logits.mT, batch[:, 1:])`` minimized by
    ``torch.optim.AdamW``, where during the masked steps the gradients of dropped weights are set to 0 before
    anything sees them: the optimizer's moments of these weights then stay 0, weight decay has nothing to shrink,
    and they are exactly 0 after each step. A weight of a pruned component that is 0 for another reason counts as
    dropped. Sequences are taken in a random order, each once before any comes again. The model is put in eval mode,
    so that there is no dropout, and no random number but the seed's is used. Tied weights stay tied; a weight that
    requires no gradient is not trained.

    Memory: 16 bytes for each weight (itself, its gradient, two moments), one for each pruned component's in the
    mask, and what ``micro_batch`` sequences take on their way through the model.

    ``folder`` gets a checkpoint before the first step, after every ``checkpoint_every`` and after the last. Then they
    make room for ``losses.json`` ({"masked": number of steps, "losses": those of all steps}) and ``model/``. Called
    again with the same arguments, the model as it was at first, it goes on from the last checkpoint and ends in the
    same bits as if it had not been interrupted, given the same machine and number of threads. If it was finished, the
    model gets the stored weights at once.

    Args:
        model: a float32 decoder on one device. In bfloat16 steps of this size would be rounded away.
        configuration: component → ``Prune`` by magnitude, or ``Drop``; those it does not name are trained, too.
        tokens: int64 [S, length]; ``blocks_of`` makes it from text.
        settings: how to train.
        folder: of this training alone; made if it is not there.

    Raises:
        InputError: tokens are none, of another length than settings', or not of this model's vocabulary.
        ModelError: the model is not float32, nothing of it can be trained, or it could not be saved.
        ComponentError, TreatmentError: the configuration does not fit the model, or has other treatments.
        RunError: the folder is of other arguments, in use, damaged or not writable.
        TrainingError: a loss, gradient or weight is NaN or infinite; the model is put back to the last checkpoint,
            which stays.

    Source: Deiseroth et al. 2023 (papers.md §1.5); what it does not say is decided in ``Recovery``.
    """
    decoder = Decoder.of(model)
    check_training(decoder, configuration, tokens, settings)
    identity = {
        "model": model_identity(model),
        "configuration": configuration_identity(configuration),
        "tokens": _identity(tokens),
        **asdict(settings),
    }
    with RunDirectory.resume(folder, identity) as run:
        if (folder / _MODEL).is_dir():
            _load_finished(model, folder / _MODEL)
        else:
            with torch.inference_mode(False), torch.enable_grad():
                losses = _train(decoder, configuration, tokens, settings, folder)
            make_durable(run.write_json(_LOSSES, {"masked": settings.masked_steps, "losses": losses}))
            # The last to appear, so that it says that the training is finished.
            write_folder(folder / _MODEL, model.save_pretrained)
        remove_checkpoints(folder)
        found = run.read_json(_LOSSES)
    if found is None:
        raise RunError(f"{folder}: {_LOSSES} is missing; delete the folder to start anew")
    return Recovered(found["masked"], found["losses"], folder / _MODEL)


def check_training(
    decoder: Decoder, configuration: Configuration, tokens: Tensor, settings: Recovery
) -> None:
    """Refuses what ``recover`` cannot train, before anything is changed; raises as it does."""
    check_trainable(decoder.model, settings)
    if isinstance(configuration, Mapping):
        for path, treatment in configuration.items():
            # The mask is made again from the model alone when a training goes on.
            if isinstance(treatment, Treatment) and (
                not isinstance(treatment, (Prune, Drop)) or treatment.needs_inputs
            ):
                raise TreatmentError(
                    f"{path}: recovery trains what is pruned by magnitude or dropped, not {treatment.key}"
                )
    check_configuration(decoder, configuration)
    if not isinstance(tokens, Tensor):
        raise InputError(f"tokens: expected int64 [S, {settings.length}], got {type(tokens).__name__}")
    if tokens.dtype != torch.int64 or tokens.dim() != 2 or tokens.shape[1] != settings.length:
        raise InputError(
            f"tokens: expected int64 [S, {settings.length}], got {tokens.dtype} {list(tokens.shape)}"
        )
    if not len(tokens):
        raise InputError("tokens: no sequence to train on")
    embedding: Any = decoder.model.get_input_embeddings()
    rows, least, most = embedding.weight.shape[0], int(tokens.min()), int(tokens.max())
    if least < 0 or most >= rows:
        raise InputError(f"tokens: ids go from {least} to {most}, the model embeds {rows}")


def check_trainable(model: PreTrainedModel, settings: Recovery) -> None:
    """Refuses a model that ``recover`` cannot train with any configuration; raises as it does."""
    if is_accelerated(model):
        raise ModelError("recovery: the model is accelerated: dtm_fast.restore(model) first, or load it anew")
    check_storable(model)
    for name, parameter in model.named_parameters():
        if parameter.dtype != torch.float32:
            raise ModelError(
                f"recovery trains float32, {name} is {parameter.dtype}: load it as torch.float32"
            )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ModelError("recovery: no weight of the model requires a gradient")
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and settings.length > context:
        raise InputError(f"length {settings.length} is beyond the model's context of {context} tokens")


def _identity(tokens: Tensor) -> str:
    digest = hashlib.sha256(f"{tuple(tokens.shape)};".encode())
    digest.update(tokens.cpu().contiguous().numpy().data)
    return digest.hexdigest()


def _load_finished(model: PreTrainedModel, folder: Path) -> None:
    """Gives the model the weights that were stored at the end, in place."""
    try:
        stored = type(model).from_pretrained(folder, dtype=torch.float32)
        model.load_state_dict(stored.state_dict())
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        raise RunError(
            f"{folder}: cannot be read: {first_line(error)}; delete {folder.parent} to start anew"
        ) from error
    model.eval()


def _train(
    decoder: Decoder, configuration: Configuration, tokens: Tensor, settings: Recovery, folder: Path
) -> list[float]:
    """Prunes and trains the model, from the last checkpoint where there is one; the losses of all steps."""
    model = decoder.model.eval()
    dropped = _prune(decoder, configuration)
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    optimizer = _optimizer(weights, settings)
    order = _order(len(tokens), settings)
    kept = latest_checkpoint(folder)
    losses: list[float] = []
    if kept is None:
        save_checkpoint(folder, weights, optimizer, losses)
    else:
        losses = load_checkpoint(kept, weights, optimizer)
    optimizer.zero_grad()
    try:
        for step in range(len(losses), settings.steps):
            if step >= settings.masked_steps:
                dropped.clear()
            for group in optimizer.param_groups:
                group["lr"] = settings.rate_at(step)
            loss = _backward(model, tokens[order[step]], settings.micro_batch)
            for weight, mask in dropped.items():
                if weight.grad is not None:
                    weight.grad.masked_fill_(mask, 0)
            norm = nn.utils.clip_grad_norm_(weights.values(), settings.clip, foreach=False)
            _check_finite("loss", loss, step, settings)
            _check_finite("norm of the gradient", norm, step, settings)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            last = len(losses) == settings.steps
            if last or len(losses) % settings.checkpoint_every == 0:
                # The next step would find a weight that is none, but then it would be in the checkpoint.
                for name, weight in weights.items():
                    _check_finite(f"sum of {name}", weight.detach().sum(dtype=torch.float64), step, settings)
                save_checkpoint(folder, weights, optimizer, losses)
    except TrainingError as error:
        good = latest_checkpoint(folder)
        assert good is not None
        load_weights(good, weights)
        raise TrainingError(f"{error}; the model is put back to {good}, which is kept") from None
    finally:
        optimizer.zero_grad()
    return losses


def _prune(decoder: Decoder, configuration: Configuration) -> dict[nn.Parameter, Tensor]:
    """Prunes in place; of each pruned weight a bool mask of its own shape, True where it is 0."""
    for path, treatment in configuration.items():
        component = decoder.component(path)
        component.weight.copy_(treatment.compress(component.weight))
    pruned = (decoder.component(path).parameter for path in configuration)
    return {weight: weight.detach() == 0 for weight in pruned}


def _optimizer(weights: dict[str, nn.Parameter], settings: Recovery) -> AdamW:
    groups: list[dict[str, Any]] = [
        {"params": [weight for weight in weights.values() if weight.dim() >= 2]},
        {"params": [weight for weight in weights.values() if weight.dim() < 2], "weight_decay": 0.0},
    ]
    # One weight after the other, instead of a second copy of all.
    return AdamW(groups, betas=_BETAS, weight_decay=settings.weight_decay, foreach=False)


def _order(sequences: int, settings: Recovery) -> Tensor:
    """Which sequences each step takes, int64 [steps, batch]: permutations of all, one after the other."""
    generator = torch.Generator().manual_seed(settings.seed)
    needed = settings.steps * settings.batch
    rounds = [torch.randperm(sequences, generator=generator) for _ in range(math.ceil(needed / sequences))]
    return torch.cat(rounds)[:needed].reshape(settings.steps, settings.batch)


def _backward(model: PreTrainedModel, batch: Tensor, micro_batch: int) -> Tensor:
    """Adds the gradients of the batch's mean cross entropy to the weights', and returns that mean."""
    device = model.device
    targets = len(batch) * (batch.shape[1] - 1)
    total = torch.zeros((), device=device)
    for part in batch.split(micro_batch):
        rows = part.to(device)
        logits = model(rows[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum") / targets
        loss.backward()
        total += loss.detach()
    return total


def _check_finite(what: str, value: Tensor, step: int, settings: Recovery) -> None:
    if not math.isfinite(value):
        part = "masked" if step < settings.masked_steps else "unmasked"
        raise TrainingError(
            f"recovery, step {step + 1} of {settings.steps} ({part}): the {what} is {value.item()}"
        )
