"""Every position of every completion, exactly: for SDT and whatever needs likelihoods."""

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from dtm_fast.compression import Configuration
from dtm_fast.errors import MeasurementError
from dtm_fast.measure.columns import columns_of, first_predicted, joined, perplexity_of
from dtm_fast.measure.fused_layers import FusedLayers
from dtm_fast.measure.head import Head
from dtm_fast.measure.model_layers import ModelLayers, State
from dtm_fast.measure.prefix_tree import Node, tree_of, walk

Columns = dict[str, Tensor]
"""Values per probe, by the names of ``Measurement.of`` (and ``fdt``)."""


class CompletePass:
    """Measures all positions of configurations.

    Args:
        model_layers: run where there are no fused ones.
        fused: run where there are any.
        head: where logits are a product with the head's weight; None where they are more than that.
    """

    def __init__(self, model_layers: ModelLayers, fused: FusedLayers | None, head: Head | None) -> None:
        """Measures nothing yet."""
        self._model_layers = model_layers
        self._fused = fused if head is not None else None
        self._head = head
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
        for leaf, state in self._leaves(root, first_output):
            result: Columns | MeasurementError
            try:
                result = self._columns(state, metrics)
            except MeasurementError as error:
                result = error
            yield leaf.ends, result

    def _leaves(self, root: Node, first_output: int) -> Iterator[tuple[Node, Tensor | State | None]]:
        if self._fused is None:
            for leaf, state in walk(root, None, self._advance):
                yield leaf, state
            return
        for leaf, fused_state in walk(root, None, partial(self._advance_fused, first_output)):
            yield leaf, fused_state

    def _advance(self, node: Node, state: State | None) -> State:
        self.layer_evaluations += 1
        layer = node.layer - 1
        before = self._model_layers.base(layer) if state is None else state
        return self._model_layers.advance(before, layer, node.treatments)

    def _advance_fused(self, first_output: int, node: Node, state: Tensor | None) -> Tensor:
        assert self._fused is not None
        self.layer_evaluations += 1
        fused, layer = self._fused, node.layer - 1
        wanted = first_output if node.layer == self._depth else 0
        everyone = range(fused.count)
        return fused.run(layer, node.treatments, state, fused.exact, everyone, first_output=wanted)

    def _columns(self, state: Tensor | State | None, metrics: frozenset[str]) -> Columns:
        if state is None:
            # The base's text was written by the model's own head, and another order of sums might break a tie
            # otherwise.
            return self._from_logits(self._model_layers.base(self._depth), metrics)
        if self._head is not None and metrics <= {"sdt", "dppl"}:
            return self._without_logits(self._head, self._head_input(state), "dppl" in metrics)
        if isinstance(state, Tensor):
            state = self._model_layers.split(state)
        return self._from_logits(state, metrics)

    def _head_input(self, state: Tensor | State) -> Tensor:
        """[P, N, D]."""
        if isinstance(state, Tensor):
            assert self._fused is not None
            fused, first = self._fused, self._model_layers.probes.prefix - 1
            return fused.head_input(state[:, first:], fused.exact, range(fused.count), first, fused.positions)
        return self._model_layers.head_input(state)

    @staticmethod
    def _without_logits(head: Head, hidden: Tensor, with_dppl: bool) -> Columns:
        decided = head.decide(hidden, range(len(hidden)), 0)
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
                raise MeasurementError("the model's logits are not finite")

            def base_logits(batch: int = batch) -> Tensor:
                return self._model_layers.logits(self._model_layers.base(self._depth), batch, probes.prefix)

            parts.append(columns_of(logits, tokens, probes.prefix, metrics, base_logits, prefix_choices))
        return joined(parts)
