"""The stages of a certificate on a GPU, where to launch and to wait costs more than to compute.

One pass counts the threats of all positions and how many positions and tokens there are to compare; that is read
once, and sizes all that follows. A position with many threats would burden those with few, so that there are classes
of them; neighbouring ones are decided together where that is no more work than to launch twice.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from dtm_fast.ops import native
from dtm_fast.ops.certificate import Certificate
from dtm_fast.ops.certificate_threats import count_threats_cuda

# As in certificate_threats.h: class i has 16^i < threats <= 16^(i + 1), and class 0 also 1.
_CLASSES = 8
_BASE = 16
_WORD = 32  # tokens that one number of a set of tokens holds
_FREE = 2**22  # logits that a GPU computes in about the time that another call takes


class Group(NamedTuple):
    """Neighbouring classes whose positions are decided together."""

    first: int
    last: int
    positions: int
    """With threats of these classes."""
    tokens: int
    """At most so many tokens threaten them or are their top tokens or references."""

    def work(self) -> int:
        """Logits."""
        return self.positions * self.tokens

    def with_next(self, other: "Group") -> "Group":
        """Both, as one."""
        return Group(self.first, other.last, self.positions + other.positions, self.tokens + other.tokens)


def threats_of(group: Group, kept: int) -> tuple[int, int]:
    """The least and the most threats of a group's positions, where `kept` tokens are known of each."""
    return (_BASE**group.first + 1 if group.first else 1), min(_BASE ** (group.last + 1), kept)


def groups(histogram: list[int], tokens: list[int], kept: int) -> list[Group]:
    """How to decide positions by the nearest tokens.

    Args:
        histogram: how many positions have so many threats, from 0 to kept + 1.
        tokens: how many tokens each class has.
        kept: nearest tokens that are known of a position.
    """
    found: list[Group] = []
    for index, count in enumerate(tokens[: classes_of(kept)]):
        least, most = threats_of(Group(index, index, 0, 0), kept)
        own = Group(index, index, sum(histogram[least : most + 1]), count)
        if own.positions == 0:
            continue
        together = found[-1].with_next(own) if found else own
        if found and together.work() <= found[-1].work() + own.work() + _FREE:
            found[-1] = together
        else:
            found.append(own)
    return found


def classes_of(kept: int) -> int:
    """How many classes positions with up to `kept` threats have."""
    return 0 if kept == 0 else max((kept - 1).bit_length() - 1, 0) // 4 + 1


def decided(
    hidden: torch.Tensor,
    lm_head: torch.Tensor,
    reference: torch.Tensor,
    certificate: Certificate,
    mismatch_of: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
) -> tuple[torch.Tensor, list[int]]:
    """certified_mismatch, with its arguments, but for the int8 screen.

    Returns:
        mismatch bool [P], and how many positions have 0, 1, … K + 1 threats, where K is the number of nearest tokens;
        those with K + 1 were decided by the full head.
    """
    (positions, kept), vocabulary, device = certificate.nearest.shape, len(lm_head), hidden.device
    reference = reference.contiguous()
    words = -(-vocabulary // _WORD)
    begin = kept + 2 + _CLASSES  # of the sets of tokens
    threats = torch.empty(positions, dtype=torch.int64, device=device)
    mismatch = torch.empty(positions, dtype=torch.bool, device=device)
    counts = torch.empty(begin + classes_of(kept) * words, dtype=torch.int32, device=device)
    count_threats_cuda(
        threats,
        hidden,
        certificate.hidden.flatten(0, 1),
        certificate.radius,
        (certificate.top.contiguous(), certificate.nearest.contiguous(), reference, mismatch, counts),
        vocabulary,
    )
    numbers = counts[:begin].tolist()  # here it waits
    histogram = numbers[: kept + 2]
    histogram[0] = positions - sum(histogram)
    most = histogram[kept + 1]
    if most:
        # First: it takes the device longest, and the host prepares the rest meanwhile. A look at the vocabulary in int8
        # would read half as much, in many more steps. topk, as the number is known, and nonzero would wait.
        left = threats.topk(most).indices
        mismatch[left] = mismatch_of(hidden.index_select(0, left), lm_head, reference.index_select(0, left))
    for group in groups(histogram, numbers[kept + 2 :], kept):
        tokens = min(group.tokens, vocabulary)
        bits = counts.data_ptr() + (begin + group.first * words) * counts.element_size()
        some, among, ids = _select(threats, reference, vocabulary, bits, group, tokens, kept)
        rows = hidden.index_select(0, some)
        if 2 * tokens < vocabulary:
            mismatch[some] = mismatch_of(rows, lm_head.index_select(0, ids), among)
        else:  # as cheap, and no copy of most of lm_head
            mismatch[some] = mismatch_of(rows, lm_head, reference.index_select(0, some))
    return mismatch, histogram


def _select(
    threats: torch.Tensor,
    reference: torch.Tensor,
    vocabulary: int,
    bits: int,
    group: Group,
    tokens: int,
    kept: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A group's positions, where their references are among its tokens, and these, in ascending order.

    The last token is repeated where there are fewer than `tokens`; bits: where the sets of the group's classes are.
    """
    cuda, stream = native.cuda_call(threats.device)
    words = -(-vocabulary // _WORD)
    sizes = [group.positions, group.positions, tokens, (words + 1) // 2]
    memory = torch.empty(sum(sizes), dtype=torch.int64, device=threats.device)
    some, among, ids, before = memory.split(sizes)
    with native.on_device(threats.device):
        cuda.select_threatened(
            threats.data_ptr(),
            reference.data_ptr(),
            threats.shape[0],
            vocabulary,
            *threats_of(group, kept),
            bits,
            group.last - group.first + 1,
            before.data_ptr(),
            group.positions,
            tokens,
            some.data_ptr(),
            among.data_ptr(),
            ids.data_ptr(),
            stream,
        )
    return some, among, ids
