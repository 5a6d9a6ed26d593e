"""Decisions by the whole head: where it costs a percent of the layers, proofs are not worth their steps."""

from collections.abc import Sequence
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from dtm_fast.errors import NotFiniteError
from dtm_fast.measure.forward import first_divergent
from dtm_fast.measure.head import Decisions

_LOGITS = 2**27  # held at a time


class WholeHead:
    """The head of a model whose logits are a product with one weight and nothing else, on the model's device.

    Every decision is certain, for nothing is known of the hidden states' error. Nothing waits for the device but the
    end of a call, which brings all decisions to the CPU at once.

    Args:
        weight: [V, D].
        hidden: [P, N, D], what the base multiplies by it to predict each completion token.
        reference: int64 [P, N], the completions.
    """

    def __init__(self, weight: Tensor, hidden: Tensor, reference: Tensor) -> None:
        """Computes nothing yet."""
        self._weight = weight.detach()
        self._hidden = hidden
        self._reference = reference.to(weight.device)

    @cached_property
    def base_divergence(self) -> list[int]:
        """The first position of each completion where the base chooses another token; N where there is none."""
        return first_divergent(self.decide(self._hidden, range(len(self._hidden)), 0).mismatch).tolist()

    def decide(
        self,
        hidden: Tensor,
        rows: Sequence[int],
        first: int,
        error: float = 0.0,
        until_mismatch: bool = False,
    ) -> Decisions:
        """What probes ``rows`` choose at positions ``first`` … of their completions, on the CPU.

        Args:
            hidden: [R, C, D], what the head multiplies.
            rows: the probes, R of them.
            first: the position in the completions of ``hidden[:, 0]``.
            error: must be 0.
            until_mismatch: makes no difference.

        Raises:
            NotFiniteError: hidden is not finite.
        """
        assert error == 0, "of a whole product nothing is known of how far a decision is from its border"
        R, C = hidden.shape[:2]  # noqa: N806
        reference = self._reference[list(rows), first : first + C].flatten()
        mismatch, lead = self._decide(hidden.reshape(R * C, -1), reference)
        return Decisions(mismatch.view(R, C), torch.ones(R, C, dtype=torch.bool), lead.view(R, C))

    def decide_at(
        self, hidden: Tensor, rows: Sequence[int], positions: Sequence[int], errors: Sequence[float]
    ) -> Decisions:
        """As ``decide``, with a probe and a position of its completion for each of R hidden states [R, D].

        Raises:
            NotFiniteError: hidden is not finite.
        """
        assert not any(errors)
        mismatch, lead = self._decide(hidden, self._reference[list(rows), list(positions)])
        return Decisions(mismatch, torch.ones_like(mismatch), lead)

    @torch.no_grad()
    def _decide(self, hidden: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
        found = []
        for some, written in zip(*(each.split(self._rows) for each in (hidden, reference)), strict=True):
            logits = F.linear(some, self._weight)
            chosen = logits.argmax(dim=1)  # the lowest id, where logits are equal
            both = logits.gather(1, torch.stack([written, chosen], dim=1)).float()
            found.append(torch.stack([(chosen != written).float(), both[:, 0] - both[:, 1]]))
        # One copy for all, for each waits for the device. max() hands a NaN on.
        finite = torch.isfinite(hidden).all().float().expand(2, 1)
        together = torch.cat([finite, *found], dim=1).cpu()
        if not bool(together[0, 0]):
            raise NotFiniteError("the model's logits are not finite")
        mismatch = together[0, 1:] > 0
        return mismatch, torch.where(mismatch, together[1, 1:], torch.nan)

    @property
    def _rows(self) -> int:
        return max(1, _LOGITS // len(self._weight))
