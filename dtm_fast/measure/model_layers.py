"""The layers of any Hugging Face decoder, run one by one with torch."""

import torch
from torch import Tensor

from dtm_fast.compression import Change, Configuration
from dtm_fast.measure.probes import Probes
from dtm_fast.measure.tensor_store import TensorStore
from dtm_fast.model import Decoder
from dtm_fast.model.stepping import (
    LayerCall,
    has_plain_head,
    head_input_after,
    logits_after,
    record_calls,
)

State = list[Tensor]
"""Hidden states between two layers, [b, T, D] for each batch of the probes."""


class ModelLayers:
    """Runs single layers of a model on the probes, from the base's own states on.

    Every layer is called as the model itself calls it, on the same batches of probes: what comes out is what the
    whole model gives, to the bit.

    Args:
        decoder: of a causal language model in eval mode.
        probes: what is read.
        store: keeps the base's states.
        all_states: whether those between the layers are wanted, and not only the first and the last.

    Raises:
        ModelError: the model's layers cannot be run one by one.
    """

    def __init__(self, decoder: Decoder, probes: Probes, store: TensorStore, all_states: bool = True) -> None:
        """Reads the probes once with the base."""
        self.decoder = decoder
        self.probes = probes
        self._store = store
        self._batches = probes.tokens.split(probes.batch_size)
        self._calls: list[list[LayerCall]] = []
        for batch, tokens in enumerate(self._batches):

            def keep(layer: int, state: Tensor, batch: int = batch) -> None:
                if all_states or layer in (0, len(decoder.layers)):
                    store.put(("model", batch, layer), state)

            self._calls.append(record_calls(decoder, tokens, keep))

    @property
    def plain_head(self) -> bool:
        """Whether the logits are the product with the head's weight and nothing else."""
        model, states = self.decoder.model, self.base(len(self.decoder.layers))
        return has_plain_head(model, self._calls[0], self._batches[0], states[0])

    def base(self, layer: int) -> State:
        """The base's state before ``layer`` runs (after the last one: ``layer`` is their number)."""
        return [self._store["model", batch, layer] for batch in range(len(self._batches))]

    def entering(self, layer: int) -> Tensor:
        """The same for all probes, [P, T, D]."""
        return torch.cat(self.base(layer))

    @torch.no_grad()
    def advance(self, state: State, layer: int, treatments: Configuration) -> State:
        """The state after ``layer`` with ``treatments`` of its components."""
        with Change(self.decoder, treatments):
            return [calls[layer](hidden) for calls, hidden in zip(self._calls, state, strict=True)]

    def advance_whole(self, state: Tensor, layer: int, treatments: Configuration) -> Tensor:
        """The same of a float32 state [P, T, D] of all probes, which may lack their last positions."""
        out = torch.cat(self.advance(self.split(state), layer, treatments))
        return out[:, : state.shape[1]].to(state.dtype)

    def split(self, state: Tensor) -> State:
        """A float32 state [P, T, D] as that of the batches, in the model's dtype, with all positions.

        The state of a position that is not there is that of the last one: nothing sees it.
        """
        missing = self.probes.tokens.shape[1] - state.shape[1]
        filled = torch.cat([state, state[:, -1:].expand(-1, missing, -1)], dim=1)
        return list(filled.to(self.decoder.model.dtype).split(self.probes.batch_size))

    def head_input(self, state: State) -> Tensor:
        """What the head multiplies to predict the completions, [P, N, D]; for a plain head."""
        return torch.cat(
            [
                head_input_after(self.decoder.model, calls, tokens, hidden, self.probes.prefix)
                for calls, tokens, hidden in zip(self._calls, self._batches, state, strict=True)
            ]
        )

    def logits(self, state: State, batch: int, first: int) -> Tensor:
        """The logits of one batch that predict its tokens from ``first`` on, [b, T - first, V]."""
        return logits_after(self.decoder.model, self._calls[batch], self._batches[batch], state[batch], first)
