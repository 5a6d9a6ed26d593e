"""Every position of every completion, exactly: for SDT and whatever needs likelihoods."""

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from dtm_fast.compression import Configuration
from dtm_fast.errors import MeasurementError, NotFiniteError
from dtm_fast.measure.columns import columns_of, first_predicted, joined, perplexity_of
from dtm_fast.measure.head import Head
from dtm_fast.measure.model_layers import ModelLayers, State
from dtm_fast.measure.part_layers import PartHead, PartLayers
from dtm_fast.measure.prefix_tree import Node, tree_of, walk

Columns = dict[str, Tensor]
"""Values per probe, by the names of ``Measurement.of`` (and ``fdt``)."""


class CompletePass:
    """Measures all positions of configurations.

    Args:
        model_layers: run where there are no others.
        layers: run where there are any: for all metrics where they share parts, else for SDT.
        head: where logits are a product with the head's weight; None where they are more than that.
        part_head: decides of what ``layers`` give; by default ``head``.
    """

    def __init__(
        self,
        model_layers: ModelLayers,
        layers: PartLayers | None,
        head: Head | None,
        part_head: PartHead | None = None,
    ) -> None:
        """Measures nothing yet."""
        self._model_layers = model_layers
        self._layers = layers if head is not None else None
        self._head = head
        self._part_head = part_head or head
        self._depth = len(model_layers.decoder.layers)
        self.layer_evaluations = 0
        """Layers run so far."""

    @torch.no_grad()
    def results(
        self, configurations: Sequence[Configuration], metrics: frozenset[str]
    ) -> Iterator[tuple[list[int], Columns | MeasurementError]]:
        """The columns of each leaf of the configurations' tree, or why there are none, with their indices."""
        root = tree_of(self._model_layers.decoder, configurations)
        # Of positions that predict nothing that is asked for, the last layer gives nothing.
        first_output = first_predicted(metrics, self._model_layers.probes.prefix) - 1
        # What is asked of likelihoods has the bits of the model's own layers, where there are no exact ones but those.
        layers = self._layers
        if layers is not None and not layers.shares_parts and not metrics <= {"sdt"}:
            layers = None
        for leaf, state in self._leaves(root, first_output, layers):
            result: Columns | MeasurementError
            try:
                result = state if isinstance(state, MeasurementError) else self._columns(state, metrics)
            except MeasurementError as failure:
                result = failure
            yield leaf.ends, result

    def _leaves(
        self, root: Node, first_output: int, layers: PartLayers | None
    ) -> Iterator[tuple[Node, Tensor | State | MeasurementError | None]]:
        if layers is None:
            for leaf, state in walk(root, None, self._advance):
                yield leaf, state
            return
        for leaf, own_state in walk(root, None, partial(self._advance_own, layers, first_output)):
            yield leaf, own_state

    def _advance(self, node: Node, state: State | None) -> State:
        self.layer_evaluations += 1
        layer = node.layer - 1
        before = self._model_layers.base(layer) if state is None else state
        return self._model_layers.advance(before, layer, node.treatments)

    def _advance_own(self, layers: PartLayers, first_output: int, node: Node, state: Tensor | None) -> Tensor:
        self.layer_evaluations += 1
        wanted = first_output if node.layer == self._depth else 0
        everyone = range(layers.count)
        return layers.run(node.layer - 1, node.treatments, state, layers.exact, everyone, first_output=wanted)

    def _columns(self, state: Tensor | State | None, metrics: frozenset[str]) -> Columns:
        if state is None:
            # The base's text was written by the model's own head, and another order of sums might break a tie
            # otherwise.
            return self._from_logits(self._model_layers.base(self._depth), metrics)
        if self._head is not None and metrics <= {"sdt", "dppl"}:
            return self._without_logits(self._head, state, "dppl" in metrics)
        if isinstance(state, Tensor):
            state = self._model_layers.split(state)
        return self._from_logits(state, metrics)

    def _head_input(self, state: Tensor | State) -> Tensor:
        """[P, N, D]."""
        if isinstance(state, Tensor):
            assert self._layers is not None
            layers, first = self._layers, self._model_layers.probes.prefix - 1
            return layers.head_input(
                state[:, first:], layers.exact, range(layers.count), first, layers.positions
            )
        return self._model_layers.head_input(state)

    def _without_logits(self, head: Head, state: Tensor | State, with_dppl: bool) -> Columns:
        hidden = self._head_input(state)
        decides = self._part_head if isinstance(state, Tensor) else head
        assert decides is not None
        decided = decides.decide(hidden, range(len(hidden)), 0)
        first = decided.mismatch.int().argmax(dim=1, keepdim=True)
        found = {"mismatch": decided.mismatch, "first_lead": decided.lead.gather(1, first)[:, 0]}
        if with_dppl:
            found["dppl"] = perplexity_of(head.nll(hidden))
        return {name: column.cpu() for name, column in found.items()}

    def _from_logits(self, state: State, metrics: frozenset[str]) -> Columns:
        probes = self._model_layers.probes
        rows = probes.batch_size
        parts = []
        for batch, (tokens, prefix_choices) in enumerate(
            zip(probes.tokens.split(rows), probes.prefix_choices.split(rows), strict=True)
        ):
            logits = self._model_layers.logits(state, batch, first_predicted(metrics, probes.prefix))
            if not torch.isfinite(logits.amax(dim=-1)).all():
                raise NotFiniteError("the model's logits are not finite")

            def base_logits(batch: int = batch) -> Tensor:
                return self._model_layers.logits(self._model_layers.base(self._depth), batch, probes.prefix)

            parts.append(columns_of(logits, tokens, probes.prefix, metrics, base_logits, prefix_choices))
        return joined(parts)
