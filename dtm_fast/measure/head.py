"""From the last hidden states to decisions: which positions diverge, how surely, and by how much."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dtm_fast import ops
from dtm_fast.errors import MeasurementError
from dtm_fast.measure.forward import lead
from dtm_fast.ops import native
from dtm_fast.ops.certificate import product_dtype
from dtm_fast.ops.certificate_threats import count_threats
from dtm_fast.ops.masked_linear import masked_linear

_RIVALS = 16  # tokens of the largest logits whose distance to a decision is looked at
_ROWS = 256  # positions whose logits of the whole vocabulary are held at a time
_GROUP = 32  # of these, so many are decided among the same few tokens
_WORTHWHILE = 0.25  # with more of the vocabulary than this, all of it is as cheap


@dataclass(frozen=True, eq=False)
class Decisions:
    """What R probes choose at C positions of their completions.

    Attributes:
        mismatch: bool [R, C]: another token than the base wrote.
        certain: bool [R, C]: the hidden states' error cannot have decided that.
        lead: float32 [R, C]: the base's token's logit minus the largest other; NaN where there is no mismatch.
    """

    mismatch: Tensor
    certain: Tensor
    lead: Tensor


class Head:
    """The head of a model whose logits are a product with one weight and nothing else.

    Decides by proofs where hidden states are near the base's, and by exact logits elsewhere. On the CPU a decision and
    its lead depend on their own hidden state alone, to the bit; a GPU's products round by their shape.

    Args:
        weight: [V, D], for which ``can_prove``.
        hidden: [P, N, D], what the base multiplies by it to predict each completion token.
        reference: int64 [P, N], the completions.
    """

    def __init__(self, weight: Tensor, hidden: Tensor, reference: Tensor) -> None:
        """Builds the certificate."""
        self._weight = weight.detach()
        self._reference = reference.to(weight.device)
        self._certificate = ops.Certificate.build(hidden, self._weight)
        self._norm = torch.linalg.vector_norm(self._weight, dim=1, dtype=torch.float32)

    def decide(self, hidden: Tensor, rows: Sequence[int], first: int, error: float = 0.0) -> Decisions:
        """What probes ``rows`` choose at positions ``first`` … of their completions.

        Args:
            hidden: [R, C, D], what the head multiplies.
            rows: the probes, R of them.
            first: the position in the completions of ``hidden[:, 0]``.
            error: how far the distance of a hidden state to the border of a decision may be from its true one, in
                units of how far the state is from the base's; 0: not at all.

        Raises:
            MeasurementError: hidden is not finite.
        """
        check_finite(hidden)
        kept = self._certificate
        P, N = self._reference.shape  # noqa: N806
        R, C = hidden.shape[:2]  # noqa: N806
        wanted = torch.as_tensor(list(rows), device=hidden.device)[:, None] * N + torch.arange(
            first, first + C, device=hidden.device
        )
        index = wanted.flatten()
        flat = hidden.reshape(R * C, -1)
        base = kept.hidden.view(P * N, -1)[index]
        reference, top = self._reference.flatten()[index], kept.top[index]
        radius = kept.radius[index] / (1 + error)
        threats = count_threats(flat, base, radius, native_code=flat.device.type == "cpu" and _native())
        mismatch, certain = top != reference, torch.ones_like(top, dtype=torch.bool)
        leads = torch.full(top.shape, torch.nan, device=flat.device)
        reach = error * (flat.float() - base.float()).norm(dim=1)
        nearest = kept.nearest[index]
        by_few = ((threats <= nearest.shape[1]) & ((threats > 0) | mismatch)).nonzero()[:, 0]
        if len(by_few):
            # The base's choice in the place of what is no threat: a row's tokens are these and its reference.
            threatening = torch.arange(nearest.shape[1], device=flat.device) < threats[by_few, None]
            own = torch.where(threatening, nearest[by_few], top[by_few, None])
            own = torch.cat([own, top[by_few, None], reference[by_few, None]], dim=1)
            tokens = own.unique()
            among = torch.zeros(len(own), len(tokens), dtype=torch.bool, device=flat.device)
            among.scatter_(1, torch.searchsorted(tokens, own), True)
            self._judge(flat, by_few, tokens, among, reference, reach, mismatch, certain, leads)
        by_many = (threats > nearest.shape[1]).nonzero()[:, 0]
        for some in by_many.split(_ROWS) if len(by_many) else ():
            for group in self._screened(flat, some, reference, reach):
                self._judge(flat, *group, reference, reach, mismatch, certain, leads)
        return Decisions(*(each.view(R, C) for each in (mismatch, certain, leads)))

    def nll(self, hidden: Tensor) -> Tensor:
        """The negative log-likelihoods float32 [P, N] of the completions under ``hidden`` [P, N, D]: the whole head."""
        return ops.token_divergence(hidden, self._weight, self._reference).nll

    def largest_move(self, hidden: Tensor) -> float:
        """By how many logits the base's leads differ at most if ``hidden`` [P, N, D] were its hidden states."""
        moved = 0.0
        for ours, theirs, reference in zip(self._certificate.hidden, hidden, self._reference, strict=True):
            leads = [lead(_linear(each, self._weight)[None], reference[None]) for each in (ours, theirs)]
            moved = max(moved, float((leads[0] - leads[1]).abs().max()))
        return moved

    def _screened(
        self, flat: Tensor, rows: Tensor, reference: Tensor, reach: Tensor
    ) -> Iterator[tuple[Tensor, Tensor | None, Tensor | None]]:
        """``rows`` in groups, with what ``_judge`` takes as ``tokens`` and ``among``."""
        screen = self._certificate.screen
        covered = torch.zeros_like(rows, dtype=torch.bool) if screen is None else screen.covers(flat[rows])
        if not bool(covered.all()):
            yield rows[~covered], None, None
        rows = rows[covered]
        if screen is None or len(rows) == 0:
            return
        rivals = screen.rivals(flat[rows], self._weight, reference[rows], reach[rows])
        rivals.scatter_(1, reference[rows, None], True)
        # Those with few are taken together, so that one with many does not burden them.
        for group in _row_counts(rivals).argsort().split(_GROUP):
            tokens = rivals[group].any(0).nonzero()[:, 0]
            if len(tokens) < _WORTHWHILE * rivals.shape[1]:
                yield rows[group], tokens, rivals[group][:, tokens]
            else:
                yield rows[group], None, rivals[group]

    def _judge(
        self,
        flat: Tensor,
        rows: Tensor,
        tokens: Tensor | None,
        among: Tensor | None,
        reference: Tensor,
        reach: Tensor,
        mismatch: Tensor,
        certain: Tensor,
        leads: Tensor,
    ) -> None:
        """Fills in what logits say of R ``rows``.

        Args:
            flat: the hidden states of all rows, as what follows ``among`` is of all.
            rows: which to judge.
            tokens: int64 [v], ascending: their logits are computed; None for all.
            among: bool [R, v], which of them can win within a row's reach; None for all. Only these tell how
                certain a row is, so that this does not depend on the others.
            reference: the tokens that the base wrote.
            reach: how far a distance to a decision may be off.
            mismatch: filled in.
            certain: filled in.
            leads: filled in.
        """
        weight = self._weight if tokens is None else self._weight.index_select(0, tokens)
        wanted = reference[rows] if tokens is None else torch.searchsorted(tokens, reference[rows])
        logits = _linear(flat[rows], weight)
        mismatch[rows] = logits.argmax(dim=1) != wanted  # the lowest id, where logits are equal
        own = logits.gather(1, wanted[:, None]).float()
        if among is not None:
            logits = logits.masked_fill(~among, -torch.inf)
        values, ids = logits.topk(min(_RIVALS + 1, logits.shape[1]), dim=1)
        ahead = own - values.float()
        ahead[ids == wanted[:, None]] = torch.inf
        leads[rows] = torch.where(mismatch[rows], ahead.amin(dim=1), torch.nan)
        if bool((reach[rows] > 0).any()):
            ids, looked_at = ids[:, :_RIVALS], ahead[:, :_RIVALS]
            apart = (weight[ids] - weight[wanted][:, None]).float().norm(dim=2)
            distance = (looked_at / apart).nan_to_num(nan=torch.inf, posinf=torch.inf).amin(dim=1).abs()
            sure = distance > reach[rows]
            # The tokens that were not looked at are at least this far away.
            others = ahead[:, _RIVALS:].amin(dim=1) if ahead.shape[1] > _RIVALS else torch.inf
            sure &= mismatch[rows] | (others / (self._norm[reference[rows]] + self._norm.max()) > reach[rows])
            certain[rows] = sure | (reach[rows] == 0)


def can_prove(weight: Tensor) -> bool:
    """Whether proofs speak of the logits that torch computes with this head."""
    if weight.dtype == torch.float32 and weight.device.type != "cpu":
        # torch may be set to round the factors to TF32; on the CPU our own product is not concerned.
        return product_dtype() == torch.float32
    return weight.dtype in (torch.float32, torch.bfloat16)


def check_finite(hidden: Tensor) -> None:
    """Raises MeasurementError unless all of ``hidden`` is finite."""
    # A finite sum proves all values finite; an overflowing one proves nothing, so then look at each.
    if not torch.isfinite(hidden.sum(dtype=torch.float32)) and not torch.isfinite(hidden).all():
        raise MeasurementError("the model's logits are not finite")


def _native() -> bool:
    return native.why_no_cpu_kernels() is None


def _row_counts(marks: Tensor) -> Tensor:
    """How many are True in each row of bool [R, V]."""
    if marks.shape[1] % 8:
        return marks.sum(1)
    # torch adds single bytes slowly. Eight at a time, up to 255 of them: no byte of the sum carries.
    sums = [part.sum(1, keepdim=True) for part in marks.view(torch.int64).split(255, dim=1)]
    return torch.cat(sums, dim=1).view(torch.uint8).sum(1)


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    """``F.linear``, on the CPU in an order of sums that no row's neighbours change."""
    if x.device.type != "cpu":
        return F.linear(x, weight)
    everything = torch.full((len(weight), -(-weight.shape[1] // 8)), 255, dtype=torch.uint8, device=x.device)
    if weight.shape[1] % 8:
        everything[:, -1] = 2 ** (weight.shape[1] % 8) - 1
    return masked_linear(x, weight, everything)
