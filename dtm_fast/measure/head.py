"""From the last hidden states to decisions: which positions diverge, how surely, and by how much."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from dtm_fast import ops
from dtm_fast.errors import NotFiniteError
from dtm_fast.measure.forward import first_divergent, lead
from dtm_fast.ops import native
from dtm_fast.ops.certificate import product_dtype
from dtm_fast.ops.certificate_threats import count_threats
from dtm_fast.ops.masked_linear import masked_linear
from dtm_fast.ops.rounding import norm_above, norms_above

_RIVALS = 16  # tokens of the largest logits whose distance to a decision is looked at
_ROWS = 256  # positions whose logits of the whole vocabulary are held at a time
_GROUP = 32  # of these, so many are decided among the same few tokens
_FAR = 2.0**126  # further apart than any two logits that are compared
_WORTHWHILE = 0.25  # with more of the vocabulary than this, all of it is as cheap


@dataclass(frozen=True, eq=False)
class Decisions:
    """What R probes choose at C positions of their completions.

    Attributes:
        mismatch: bool [R, C] (of ``decide_at``, [R]): another token than the base wrote.
        certain: bool [R, C]: the hidden states' error cannot have decided that.
        lead: float32 [R, C]: the base's token's logit minus the largest other; NaN where there is no mismatch.
    """

    mismatch: Tensor
    certain: Tensor
    lead: Tensor

    def cpu(self) -> "Decisions":
        """The same on the CPU, where each of them can be looked at without waiting for a GPU."""
        return Decisions(self.mismatch.cpu(), self.certain.cpu(), self.lead.cpu())


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
        self._norm = norms_above(self._weight)

    @cached_property
    def base_divergence(self) -> list[int]:
        """The first position of each completion where the base chooses another token; N where there is none."""
        differs = self._certificate.top.view_as(self._reference) != self._reference
        return first_divergent(differs).tolist()

    def decide(
        self,
        hidden: Tensor,
        rows: Sequence[int],
        first: int,
        error: float = 0.0,
        until_mismatch: bool = False,
    ) -> Decisions:
        """What probes ``rows`` choose at positions ``first`` … of their completions.

        Args:
            hidden: [R, C, D], what the head multiplies.
            rows: the probes, R of them.
            first: the position in the completions of ``hidden[:, 0]``.
            error: how far the distance of a hidden state to the border of a decision may be from its true one, in
                units of how far the state is from the base's; 0: not at all.
            until_mismatch: what follows the first certain mismatch of a row is not wanted and holds nothing of use.

        Raises:
            NotFiniteError: hidden is not finite.
        """
        R, C = hidden.shape[:2]  # noqa: N806
        columns = torch.arange(first, first + C, device=hidden.device)
        index = (
            torch.as_tensor(list(rows), device=hidden.device)[:, None] * self._reference.shape[1] + columns
        )
        errors = torch.tensor(error, dtype=torch.float32, device=hidden.device).expand(R * C)
        found = self._decide(hidden.reshape(R * C, -1), index.flatten(), errors, C if until_mismatch else 1)
        return Decisions(*(each.view(R, C) for each in (found.mismatch, found.certain, found.lead)))

    def decide_at(
        self, hidden: Tensor, rows: Sequence[int], positions: Sequence[int], errors: Sequence[float]
    ) -> Decisions:
        """As ``decide``, with a probe, a position of its completion and an error for each of R hidden states.

        Args:
            hidden: [R, D].
            rows: the probes.
            positions: of their completions.
            errors: as ``error`` of ``decide``.

        Returns:
            Decisions of shape [R].

        Raises:
            NotFiniteError: hidden is not finite.
        """
        index = torch.tensor(rows) * self._reference.shape[1] + torch.tensor(positions)
        error = torch.tensor(errors, dtype=torch.float32, device=hidden.device)
        found = self._decide(hidden, index.to(hidden.device), error, 1)
        return Decisions(found.mismatch, found.certain, found.lead)

    def _decide(self, hidden: Tensor, index: Tensor, error: Tensor, run: int) -> "_Rows":
        """What R ``hidden`` states [R, D] choose.

        Args:
            hidden: neighbours in runs of ``run``, of which what is behind the first certain mismatch is not wanted.
            index: int64 [R], which of all positions of all probes these are.
            error: float32 [R].
            run: 1 if everything is wanted.
        """
        check_finite(hidden)
        kept = self._certificate
        base = kept.hidden.flatten(0, 1)[index]
        reference, top, nearest = self._reference.flatten()[index], kept.top[index], kept.nearest[index]
        radius = kept.radius[index] / (1 + error)[:, None]
        threats = count_threats(hidden, base, radius, native_code=_native(hidden.device))
        moved = hidden.float() - base.float()
        rows = _Rows(
            hidden=hidden,
            reference=reference,
            # Not a product alone: far enough away the norm is infinite, of which no error is none.
            reach=torch.where((error > 0) & moved.any(dim=1), error * norm_above(moved), 0),
            mismatch=top != reference,
            certain=torch.ones_like(top, dtype=torch.bool),
            lead=torch.full(top.shape, torch.nan, dtype=torch.float32, device=hidden.device),
        )
        is_many = threats > nearest.shape[1]
        wanted = ((threats > 0) | rows.mismatch) & ~is_many
        if run > 1:
            # A certain mismatch among the nearest few is one among all, and then nothing behind it is wanted.
            wanted |= is_many
            threats = torch.where(is_many, _RIVALS, threats)
        # Those with few threats are taken together, so that one with many does not burden them.
        for chosen in (wanted & (threats <= _RIVALS), wanted & (threats > _RIVALS)):
            some = chosen.nonzero()[:, 0]
            if len(some):
                most = nearest.shape[1] if int(threats[some].max()) > _RIVALS else _RIVALS
                self._judge(
                    rows, some, *_own_tokens(nearest[some, :most], threats[some], top[some], reference[some])
                )
        if run > 1:
            sure = (rows.mismatch & rows.certain).view(-1, run)
            behind = (sure.cumsum(1) - sure.int() > 0).flatten()
            rows.certain[is_many & behind] = False  # they were judged among a few tokens only
            is_many &= ~behind
        for some in is_many.nonzero()[:, 0].split(_ROWS) if bool(is_many.any()) else ():
            for group in self._screened(rows, some):
                self._judge(rows, *group)
        return rows

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

    def _screened(self, rows: "_Rows", some: Tensor) -> Iterator[tuple[Tensor, Tensor | None, Tensor | None]]:
        """``some`` of the rows in groups, with what ``_judge`` takes as ``tokens`` and ``among``."""
        screen = self._certificate.screen
        hidden, reference = rows.hidden[some], rows.reference[some]
        covered = torch.zeros_like(some, dtype=torch.bool) if screen is None else screen.covers(hidden)
        if not bool(covered.all()):
            yield some[~covered], None, None
            some, hidden, reference = some[covered], hidden[covered], reference[covered]
        if screen is None or len(some) == 0:
            return
        rivals = screen.rivals(hidden, self._weight, reference, rows.reach[some])
        rivals.scatter_(1, reference[:, None], True)
        # Those with few are taken together, so that one with many does not burden them.
        for group in _row_counts(rivals).argsort().split(_GROUP):
            tokens = rivals[group].view(torch.uint8).amax(0).nonzero()[:, 0]  # any() is not vectorized
            if len(tokens) < _WORTHWHILE * rivals.shape[1]:
                yield some[group], tokens, rivals[group][:, tokens]
            else:
                yield some[group], None, rivals[group]

    def _judge(self, rows: "_Rows", some: Tensor, tokens: Tensor | None, among: Tensor | None) -> None:
        """Fills in what logits say of some of the rows.

        Args:
            rows: what is known, and is filled in.
            some: which of them, S.
            tokens: int64 [v], ascending: their logits are computed; None for all.
            among: bool [S, v], which of them can win within a row's reach; None for all. Only these tell how
                certain a row is, so that this does not depend on the others.
        """
        weight = self._weight if tokens is None else self._weight.index_select(0, tokens)
        reference, reach = rows.reference[some], rows.reach[some]
        wanted = reference if tokens is None else torch.searchsorted(tokens, reference)
        logits = _linear(rows.hidden[some], weight)
        mismatch = logits.argmax(dim=1) != wanted  # the lowest id, where logits are equal
        logits = logits.float()
        own = logits.gather(1, wanted[:, None])
        if among is not None:
            logits = logits + (among.float() - 1) * _FAR  # torch fills by a mask ten times as slowly
        values, ids = logits.topk(min(_RIVALS + 1, logits.shape[1]), dim=1)
        ahead = own - values
        ahead[ids == wanted[:, None]] = torch.inf
        rows.mismatch[some] = mismatch
        nearest = ahead.amin(dim=1)
        rows.lead[some] = torch.where(mismatch, nearest, torch.nan)
        # No two tokens are further apart than the sum of their norms: that alone makes most rows certain.
        furthest = self._norm[reference] + self._norm.max()
        # Who was beaten by a token that may win in another row alone was not judged among all its own.
        among_others = mismatch & (nearest > 0)
        certain = ((nearest.abs() > reach * furthest) & ~among_others) | (reach == 0)
        rows.certain[some] = certain
        close = (~certain).nonzero()[:, 0]
        if len(close):
            ids, ahead, reference, reach = ids[close], ahead[close], reference[close], reach[close]
            between = weight[ids[:, :_RIVALS]].double() - self._weight[reference][:, None].double()
            # Equal rows are no distance apart, and nothing moves between them.
            apart = torch.where(between.any(dim=2), norm_above(between), 0)
            distance = (
                (ahead[:, :_RIVALS] / apart).nan_to_num(nan=torch.inf, posinf=torch.inf).amin(dim=1).abs()
            )
            sure = distance > reach
            # The tokens that were not looked at are at least this far away.
            others = ahead[:, _RIVALS:].amin(dim=1) if ahead.shape[1] > _RIVALS else torch.inf
            sure &= mismatch[close] | (others / furthest[close] > reach)
            rows.certain[some[close]] = sure & ~among_others[close]


@dataclass(frozen=True, eq=False)
class _Rows:
    """R hidden states that are decided together, and what is known of them."""

    hidden: Tensor
    """[R, D]."""
    reference: Tensor
    """int64 [R], the tokens that the base wrote."""
    reach: Tensor
    """float32 [R], how far a distance to a decision may be off."""
    mismatch: Tensor
    """This and the next two as in ``Decisions``, each [R]."""
    certain: Tensor
    lead: Tensor


def _own_tokens(nearest: Tensor, threats: Tensor, top: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens [v] that may win in any of R rows, ascending, and which of them may in each: bool [R, v]."""
    # The base's choice in the place of what is no threat: a row's tokens are these and its reference.
    threatening = torch.arange(nearest.shape[1], device=nearest.device) < threats[:, None]
    own = torch.where(threatening, nearest, top[:, None])
    own = torch.cat([own, top[:, None], reference[:, None]], dim=1)
    tokens = own.unique()
    among = torch.zeros(len(own), len(tokens), dtype=torch.bool, device=nearest.device)
    return tokens, among.scatter_(1, torch.searchsorted(tokens, own), True)


def can_prove(weight: Tensor) -> bool:
    """Whether proofs speak of the logits that torch computes with this head."""
    if weight.dtype == torch.float32 and weight.device.type != "cpu":
        # torch may be set to round the factors to TF32; on the CPU our own product is not concerned.
        return product_dtype() == torch.float32
    return weight.dtype in (torch.float32, torch.bfloat16)


def check_finite(hidden: Tensor) -> None:
    """Raises NotFiniteError unless all of ``hidden`` is finite."""
    # A finite sum proves all values finite; an overflowing one proves nothing, so then look at each.
    if not torch.isfinite(hidden.sum(dtype=torch.float32)) and not torch.isfinite(hidden).all():
        raise NotFiniteError("the model's logits are not finite")


def _native(device: torch.device) -> bool:
    """Whether there are kernels for this device."""
    if device.type == "cpu":
        return native.why_no_cpu_kernels() is None
    return device.type == "cuda" and native.load("_cuda")[0] is not None


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
