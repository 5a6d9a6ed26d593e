"""The stages by which a certificate answers where tokens diverge, from the cheapest proof to the full head."""

from collections.abc import Callable

import torch

from dtm_fast.ops import certified_cuda
from dtm_fast.ops.autocast import without_autocast
from dtm_fast.ops.certificate import Certificate
from dtm_fast.ops.certificate_threats import Threatened, count_threats, select_threatened

_ROWS = 256  # positions screened at a time: with a byte per token, 64 MiB for a vocabulary of 262,144
_TILE = 4096
# Positions with up to these shares of the vocabulary as rivals are decided together, so that one with many does
# not burden those with few; with more than the last, the full head is as cheap.
_RIVALS = (1 / 512, 1 / 64, 1 / 8)

Mismatch = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""hidden [R, D], lm_head [v, D], reference [R] -> bool [R]: the full op on rows."""


@without_autocast
def certified_mismatch(
    hidden: torch.Tensor,
    lm_head: torch.Tensor,
    reference: torch.Tensor,
    certificate: Certificate,
    mismatch_of: Mismatch,
    backend: str,
) -> tuple[torch.Tensor, dict[str, int]]:
    """`mismatch_of(hidden, lm_head, reference)`, and how many positions each stage settled.

    The proofs say which tokens cannot win against the base's top token a. So the winner is a or one of the
    others, and the full op on the rows of lm_head of just those, in the order of their ids, finds it: the same
    bits, the same ties. One such set serves all positions of a stage, since more tokens than necessary do no
    harm. A position goes to the first stage that can prove it.

    Args:
        hidden: [P, D].
        lm_head: [V, D].
        reference: int64 [P].
        certificate: built for lm_head and P positions.
        mismatch_of: the full op, whose result for a row must not depend on the other rows and tokens.
        backend: that of mismatch_of; "cpu" and "cuda" have kernels for the first stages too.
    """
    if backend == "cuda":
        return _on_gpu(hidden, lm_head, reference, certificate, mismatch_of)
    mismatch, threats, settled = _by_radius_and_nearest(
        hidden, lm_head, reference, certificate, mismatch_of, native_code=backend == "cpu"
    )
    if sum(settled.values()) == len(reference):
        return mismatch, {**settled, "int8 screen": 0, "full head": 0}

    def decide(positions: torch.Tensor, tokens: torch.Tensor) -> None:
        _decide(mismatch, hidden, lm_head, reference, mismatch_of, positions, tokens)

    left = (threats > certificate.nearest.shape[1]).nonzero()[:, 0]
    before = len(left)
    screen = certificate.screen
    if screen is not None:
        covered = screen.covers(hidden[left])
        not_settled = [left[~covered]]
        for part in left[covered].split(_ROWS):
            rivals = screen.rivals(hidden[part], lm_head, reference[part])
            # Sums of float32 are vectorized in torch, those of bool and of integers are not.
            count = torch.stack([tile.float().sum(1) for tile in rivals.split(_TILE, 1)]).sum(0)
            below = -1.0
            for share in _RIVALS:
                group = (count > below) & (count <= share * len(lm_head))
                if group.any():
                    decide(part[group], rivals[group].view(torch.uint8).amax(0).bool())
                below = share * len(lm_head)
            not_settled.append(part[count > below])
        left = torch.cat(not_settled)
    settled["int8 screen"] = before - len(left)
    if len(left):
        mismatch[left] = mismatch_of(hidden[left], lm_head, reference[left])
    settled["full head"] = len(left)
    return mismatch, settled


def _decide(
    mismatch: torch.Tensor,
    hidden: torch.Tensor,
    lm_head: torch.Tensor,
    reference: torch.Tensor,
    mismatch_of: Mismatch,
    positions: torch.Tensor,
    tokens: torch.Tensor,
) -> None:
    """The full op at some positions, on the lm_head of the tokens (bool [V]) and the references."""
    own = reference[positions]
    tokens[own] = True
    ids = tokens.nonzero()[:, 0]
    _decide_among(
        mismatch, hidden, lm_head, mismatch_of, Threatened(positions, ids, torch.searchsorted(ids, own))
    )


def _decide_among(
    mismatch: torch.Tensor,
    hidden: torch.Tensor,
    lm_head: torch.Tensor,
    mismatch_of: Mismatch,
    some: Threatened,
) -> None:
    # Whole rows, which index_select copies faster than an index does.
    rows, weights = hidden.index_select(0, some.positions), lm_head.index_select(0, some.tokens)
    mismatch.index_copy_(0, some.positions, mismatch_of(rows, weights, some.own))


_Early = tuple[torch.Tensor, torch.Tensor, dict[str, int]]
"""mismatch bool [P], not yet right where a later stage must decide; threats int64 [P]; what each stage settled."""


def _by_radius_and_nearest(
    hidden: torch.Tensor,
    lm_head: torch.Tensor,
    reference: torch.Tensor,
    certificate: Certificate,
    mismatch_of: Mismatch,
    native_code: bool,
) -> _Early:
    threats = count_threats(hidden, certificate.hidden.flatten(0, 1), certificate.radius, native_code)
    mismatch = reference != certificate.top
    unsettled = int(threats.count_nonzero())
    settled = {"radius": len(threats) - unsettled}
    proved = 0
    for k in certificate.k:
        most = min(k, certificate.nearest.shape[1])
        settled[f"nearest {k}"] = 0
        if unsettled and most > proved:
            some = select_threatened(
                threats,
                certificate.top,
                certificate.nearest,
                reference,
                (proved + 1, most),
                len(lm_head),
                native_code,
            )
            settled[f"nearest {k}"] = len(some.positions)
            unsettled -= len(some.positions)
            if len(some.positions):
                _decide_among(mismatch, hidden, lm_head, mismatch_of, some)
        proved = most
    return mismatch, threats, settled


def _on_gpu(
    hidden: torch.Tensor,
    lm_head: torch.Tensor,
    reference: torch.Tensor,
    certificate: Certificate,
    mismatch_of: Mismatch,
) -> tuple[torch.Tensor, dict[str, int]]:
    mismatch, histogram = certified_cuda.decided(hidden, lm_head, reference, certificate, mismatch_of)
    settled, proved = {"radius": histogram[0]}, 0
    for k in certificate.k:
        most = min(k, certificate.nearest.shape[1])
        settled[f"nearest {k}"] = sum(histogram[proved + 1 : most + 1])
        proved = most
    return mismatch, {**settled, "int8 screen": 0, "full head": histogram[-1]}
