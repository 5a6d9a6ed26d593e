"""One pass of a model over tokens, in which what enters each component is summed."""

from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dtm_fast.errors import MeasurementError, ModelError
from dtm_fast.model.decoder import Component, Decoder
from dtm_fast.model.input_statistics import InputSums


def collected(
    decoder: Decoder, tokens: Tensor, batch_size: int
) -> tuple[dict[str, InputSums], dict[str, str]]:
    """Reads the tokens once and sums each component's inputs.

    Args:
        decoder: of a causal language model in eval mode.
        tokens: int64 [S, T].
        batch_size: rows in one forward pass.

    Returns:
        The sums of the components that own any, and component → who owns its sums: itself, or the first that has the
        same input (q of q, k and v, gate of gate and up). A component that no token reached has sums of none.

    Raises:
        ModelError: what has the input of another has not in every call.
        MeasurementError: an input is NaN or infinite; the message names the component.
    """
    listener = _Listener()
    # Inference mode would not say whether a tensor was written to.
    with ExitStack() as undo, torch.inference_mode(False), torch.no_grad():
        for component in decoder.components.values():
            handle = component.module.register_forward_pre_hook(partial(listener.hear, component))
            undo.callback(handle.remove)
        for rows in tokens.split(batch_size):
            decoder.model(input_ids=rows.to(decoder.model.device), use_cache=False, logits_to_keep=1)
            listener.forget()
    for path, component in decoder.components.items():
        if path not in listener.owners:
            listener.owners[path] = path
            listener.sums[path] = InputSums(component.shape[1])
    in_order = {path: listener.owners[path] for path in decoder.components}
    return listener.sums, in_order


class _Listener:
    """Sums what it hears, once for components that have the same input."""

    def __init__(self) -> None:
        self.sums: dict[str, InputSums] = {}
        self.owners: dict[str, str] = {}
        self._layer = -1
        # The owners' latest inputs in this layer, and how often they had been written to.
        self._latest: dict[str, tuple[Tensor, int]] = {}

    def hear(self, component: Component, module: nn.Module, args: tuple[Any, ...]) -> None:
        """``args[0]`` is about to enter the component."""
        x, path = args[0], component.path
        if not x.numel():
            return  # an expert that no token chose
        if component.layer != self._layer:
            self.forget()
            self._layer = component.layer
        if path not in self.owners:
            shared = (owner for owner, latest in self._latest.items() if _is_same(x, *latest))
            self.owners[path] = next(shared, path)
        owner = self.owners[path]
        if owner != path:
            if owner not in self._latest or not _is_same(x, *self._latest[owner]):
                raise ModelError(f"{path} has the input of {owner} in some calls, and another one in others")
            return
        sums = self.sums.setdefault(path, InputSums(component.shape[1]))
        try:
            sums.add(x)
        except ValueError as error:
            raise MeasurementError(f"{path}: its inputs are {error}") from error
        self._latest[path] = (x, x._version)

    def forget(self) -> None:
        """Lets go of the inputs heard so far: the memory of a later one may be that of an earlier one."""
        self._layer = -1
        self._latest.clear()


def _is_same(x: Tensor, other: Tensor, version: int) -> bool:
    """Whether they are the same numbers in the same memory, which was not written to since."""
    if x._version != version:
        return False
    same_memory = x.data_ptr() == other.data_ptr() and x.is_contiguous() and other.is_contiguous()
    same_rows = x.shape[-1] == other.shape[-1] and x.numel() == other.numel() and x.dtype == other.dtype
    return x is other or (same_memory and same_rows)
