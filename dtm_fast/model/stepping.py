"""A Hugging Face decoder run layer by layer, each layer called exactly as the model itself calls it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from dtm_fast.errors import ModelError
from dtm_fast.model.decoder import Decoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_HIDDEN = "hidden_states"


@dataclass(frozen=True, eq=False)
class LayerCall:
    """How a model calls one of its decoder layers.

    Attributes:
        layer: the module.
        args: its positional arguments behind the hidden states.
        kwargs: its keyword arguments but the hidden states.
        by_keyword: whether the hidden states are handed over as ``hidden_states=``.
        more: what the layer returns behind the hidden states; None where it returns them alone.
    """

    layer: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    by_keyword: bool
    more: tuple[Any, ...] | None

    def __call__(self, hidden: Tensor) -> Tensor:
        """What the layer makes of ``hidden`` [b, T, D], the same shape."""
        if self.by_keyword:
            output = self.layer(*self.args, **{_HIDDEN: hidden}, **self.kwargs)
        else:
            output = self.layer(hidden, *self.args, **self.kwargs)
        after: Tensor = _hidden_of(output)
        return after

    def wrap(self, hidden: Tensor) -> Any:
        """``hidden`` as the layer itself would return it."""
        return hidden if self.more is None else (hidden, *self.more)


def record(decoder: Decoder, tokens: Tensor) -> tuple[list[LayerCall], list[Tensor]]:
    """``record_calls``, with the L + 1 hidden states [b, T, D] that enter each layer and leave the last."""
    states: list[Tensor] = []
    calls = record_calls(decoder, tokens, lambda layer, state: states.append(state))
    return calls, states


@torch.no_grad()
def record_calls(
    decoder: Decoder, tokens: Tensor, on_state: Callable[[int, Tensor], None]
) -> list[LayerCall]:
    """Reads tokens once and notes how each layer is called.

    Args:
        decoder: of a causal language model in eval mode.
        tokens: int64 [b, T].
        on_state: called with each layer's number and the hidden states [b, T, D] that enter it, at the end with the
            number of layers and what leaves the last.

    Returns:
        The calls, first layer to last.

    Raises:
        ModelError: the layers do not hand on one tensor of hidden states and no more, each to the next, each once.
    """
    calls: list[LayerCall] = []
    left: list[Tensor] = []
    handed: list[list[Any]] = []
    made = WeakTensorKeyDictionary()  # tensor → the layer that returned it; keeps none of them in memory
    name = type(decoder.model).__name__

    def note_handed(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        handed.append(list(_leaves((args[1:], _without_hidden(kwargs)))))

    def note(
        index: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        if index != len(calls):
            raise ModelError(f"{name}: layer {index} runs as number {len(calls)}")
        by_keyword = not args
        hidden = kwargs.get(_HIDDEN) if by_keyword else args[0]
        if not isinstance(hidden, Tensor) or not isinstance(_hidden_of(output), Tensor):
            raise ModelError(f"{name}: layer {index} is not handed, or does not return, hidden states")
        if left and hidden is not left[0] and not torch.equal(hidden, left[0]):
            raise ModelError(
                f"{name}: what enters layer {index} is not what left layer {index - 1}, so that its layers cannot be "
                "run one by one"
            )
        rest = _without_hidden(kwargs)
        for each in _leaves((args[1:], rest)):
            if isinstance(each, Tensor) and each in made:
                raise ModelError(
                    f"{name}: layer {index} is handed more of layer {made[each]} than its hidden states, so that its "
                    "layers cannot be run one by one"
                )
        # What a layer only passes on is the same whatever is done to it.
        given = {id(each) for each in _leaves((args, kwargs))}
        for each in _leaves(output):
            if isinstance(each, Tensor) and id(each) not in given:
                made[each] = index
        more = tuple(output[1:]) if isinstance(output, tuple) else None
        calls.append(LayerCall(layer, args[1:], rest, by_keyword, more))
        on_state(index, hidden)
        left[:] = [_hidden_of(output)]

    handles = [layer.register_forward_pre_hook(note_handed, with_kwargs=True) for layer in decoder.layers]
    handles += [
        layer.register_forward_hook(
            lambda layer, args, kwargs, output, index=index: note(index, layer, args, kwargs, output),
            with_kwargs=True,
        )
        for index, layer in enumerate(decoder.layers)
    ]
    try:
        decoder.model(input_ids=tokens.to(_device(decoder.model)), use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    if len(calls) < len(decoder.layers):
        raise ModelError(f"{name}: layer {len(calls)} does not run")
    for index, (call, before) in enumerate(zip(calls, handed, strict=True)):
        if list(map(id, _leaves((call.args, call.kwargs)))) != list(map(id, before)):
            raise ModelError(
                f"{name}: what layer {index} is handed is written to while the model reads, so that its layers cannot "
                "be run one by one"
            )
    on_state(len(calls), left[0])
    return calls


@torch.no_grad()
def logits_after(
    model: PreTrainedModel, calls: list[LayerCall], tokens: Tensor, hidden: Tensor, first: int
) -> Tensor:
    """The logits that predict ``tokens[:, first:]`` where ``hidden`` leaves the last layer.

    Args:
        model: the model that the calls were recorded of.
        calls: from ``record``, of a batch of the same shape.
        tokens: int64 [b, T].
        hidden: [b, T, D].
        first: index of the first predicted token, from 1 to T - 1.

    Returns:
        [b, T - first, V] in the model's dtype.
    """
    kept = tokens.shape[1] - first + 1
    with _standing_still(calls, hidden):
        output = model(input_ids=tokens.to(model.device), use_cache=False, logits_to_keep=kept)
    return output.logits[:, -kept:-1]  # type: ignore[no-any-return]


@torch.no_grad()
def head_input_after(
    model: PreTrainedModel, calls: list[LayerCall], tokens: Tensor, hidden: Tensor, first: int
) -> Tensor:
    """What the head multiplies to predict ``tokens[:, first:]``: [b, T - first, D]; arguments as ``logits_after``.

    Only for a model whose logits are its head's output as it is (``has_plain_head``).
    """
    with _replaced(model.get_output_embeddings(), lambda x: x):
        return logits_after(model, calls, tokens, hidden, first)


def has_plain_head(model: PreTrainedModel, calls: list[LayerCall], tokens: Tensor, hidden: Tensor) -> bool:
    """Whether the logits are ``F.linear(x, weight)`` and nothing else: no bias, no soft cap, no scale, no hook.

    Arguments as ``logits_after``; the last position is looked at.
    """
    head: Any = model.get_output_embeddings()
    if type(head) is not nn.Linear or getattr(head, "bias", None) is not None:
        return False
    if head._forward_pre_hooks or head._forward_hooks or "forward" in vars(head):
        return False  # x would not be what the final norm gives, or is not all that is done
    products: list[Tensor] = []
    # Of the very rows that the model multiplies: a product of fewer may differ in the last bits.
    handle = head.register_forward_hook(
        lambda head, args, output: products.append(F.linear(args[0], head.weight))
    )
    try:
        logits = logits_after(model, calls, tokens, hidden, tokens.shape[1] - 1)
    finally:
        handle.remove()
    return len(products) == 1 and torch.equal(logits, products[0][:, -2:-1])


@contextmanager
def _standing_still(calls: list[LayerCall], hidden: Tensor) -> Iterator[None]:
    """Lets the layers do nothing, and the last one return ``hidden``."""

    def pass_on(call: LayerCall) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            return call.wrap(kwargs[_HIDDEN] if call.by_keyword else args[0])

        return forward

    with ExitStack() as undo:
        for call in calls[:-1]:
            undo.enter_context(_replaced(call.layer, pass_on(call)))
        undo.enter_context(_replaced(calls[-1].layer, lambda *args, **kwargs: calls[-1].wrap(hidden)))
        yield


@contextmanager
def _replaced(module: Any, forward: Any) -> Iterator[None]:
    """Another ``forward`` of this module alone."""
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def _hidden_of(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


def _without_hidden(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in kwargs.items() if key != _HIDDEN}


def _leaves(value: Any) -> Iterator[Any]:
    """What mappings, lists and tuples hold, however deep."""
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        yield value
        return
    for each in value:
        yield from _leaves(each)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
