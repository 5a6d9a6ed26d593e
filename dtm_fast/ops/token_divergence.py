"""Divergent tokens: where would this model have chosen another token than the reference?"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from dtm_fast.ops import backends, checks, native
from dtm_fast.ops.library import register

_REFERENCE_ROWS = 64  # tokens whose logits the reference twin holds at a time


class Divergence(NamedTuple):
    """Where and how much B sequences of T tokens diverge from their references."""

    mismatch: torch.Tensor
    """bool [B, T]: the greedy token is not the reference."""
    first: torch.Tensor
    """int64 [B]: the first divergent position, T where there is none."""
    count: torch.Tensor  # type: ignore[assignment]  # hides tuple.count
    """int64 [B]: the number of divergent positions."""
    nll: torch.Tensor
    """float32 [B, T]: negative log-likelihood of the reference token, in nats."""


def token_divergence(
    hidden: torch.Tensor, lm_head: torch.Tensor, reference: torch.Tensor, *, backend: str | None = None
) -> Divergence:
    """Compare greedy tokens with reference tokens, without ever holding the logits of the vocabulary.

    Equals, with `logits = F.linear(hidden, lm_head)`,
    `mismatch = logits.argmax(-1) != reference` and
    `nll = logits.float().logsumexp(-1) - logits.float().gather(-1, reference[..., None])[..., 0]`.
    Logits are summed in float32 and rounded to the dtype of hidden, as a model that stores them would see
    them. Ties go to the lowest token id, a NaN is larger than every number, and nll is NaN where a logit is.

    Args:
        hidden: [B, T, D], float32 or bfloat16: what the final norm gives.
        lm_head: [V, D], in the dtype of hidden.
        reference: [B, T] int64, token ids in [0, V).
        backend: None (the best), "cpu" or "reference" (which alone has a backward, for nll).

    Returns:
        Divergence(mismatch, first, count, nll).

    Raises:
        TypeError: an argument is no dense tensor of such a dtype.
        ValueError: shapes or devices do not fit, reference holds an id outside the vocabulary;
            backend is unknown.
        RuntimeError: backend cannot run; autograd would need a backward and backend is not "reference".

    Source: Deiseroth et al. 2023, "Divergent Token Metrics" (FDT is `first`, SDT is `count`).
    """
    if torch.compiler.is_compiling():
        checks.no_gradient_needed(
            "token_divergence", hidden, lm_head
        )  # the operator has none for any backend
        return Divergence(*_OPERATOR(hidden, lm_head, reference, backend))
    return Divergence(*_run(hidden, lm_head, reference, backend))


def mismatch_and_nll_reference(
    hidden: torch.Tensor, lm_head: torch.Tensor, reference: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference twin: hidden [rows, D], reference [rows] -> mismatch [rows] bool, nll [rows] float32."""
    mismatch = [torch.empty_like(reference[:0], dtype=torch.bool)]  # so that no tokens give an empty result
    nll = [torch.empty_like(reference[:0], dtype=torch.float32)]
    for start in range(0, reference.shape[0], _REFERENCE_ROWS):
        ids = reference[start : start + _REFERENCE_ROWS]
        logits = F.linear(hidden[start : start + _REFERENCE_ROWS], lm_head)
        mismatch.append(logits.argmax(-1) != ids)
        nll.append(logits.float().logsumexp(-1) - logits.float().gather(-1, ids[:, None])[:, 0])
    return torch.cat(mismatch), torch.cat(nll)


def _mismatch_and_nll_cpu(
    hidden: torch.Tensor, lm_head: torch.Tensor, reference: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    cpu, isa, threads = native.cpu_call()
    hidden, lm_head, reference = native.as_rows(hidden), native.as_rows(lm_head), reference.contiguous()
    mismatch = torch.empty(reference.shape, dtype=torch.bool)
    nll = torch.empty(reference.shape, dtype=torch.float32)
    cpu.token_divergence(
        isa,
        threads,
        native.FLOAT_TYPES[hidden.dtype],
        hidden.data_ptr(),
        hidden.stride(0),
        lm_head.data_ptr(),
        lm_head.stride(0),
        reference.data_ptr(),
        hidden.shape[0],
        *lm_head.shape,
        mismatch.data_ptr(),
        nll.data_ptr(),
    )
    return mismatch, nll


def _check(hidden: torch.Tensor, lm_head: torch.Tensor, reference: torch.Tensor) -> None:
    checks.tensor("hidden", hidden, (torch.float32, torch.bfloat16))
    checks.dims("hidden", hidden, "[B, T, D]", 3)
    checks.tensor("lm_head", lm_head, (hidden.dtype,))
    checks.dims("lm_head", lm_head, "[V, D]", 2)
    checks.size("lm_head", lm_head, 1, hidden.shape[2], "D of hidden")
    checks.tensor("reference", reference, (torch.int64,))
    checks.dims("reference", reference, "[B, T]", 2)
    checks.size("reference", reference, 0, hidden.shape[0], "B of hidden")
    checks.size("reference", reference, 1, hidden.shape[1], "T of hidden")
    checks.same_device("hidden", hidden, lm_head=lm_head, reference=reference)


def _check_token_ids(reference: torch.Tensor, vocabulary: int) -> None:
    if reference.numel() == 0:
        return
    low, high = (int(each) for each in reference.aminmax())
    if low < 0 or high >= vocabulary:
        raise ValueError(f"reference: expected token ids in [0, {vocabulary}), got ids from {low} to {high}")


def _run(
    hidden: torch.Tensor, lm_head: torch.Tensor, reference: torch.Tensor, backend: str | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    _check(hidden, lm_head, reference)
    if backend != "reference":
        checks.no_gradient_needed("token_divergence", hidden, lm_head)
    chosen = backends.choose("token_divergence", backend, hidden.device)
    _check_token_ids(reference, lm_head.shape[0])
    run = _mismatch_and_nll_cpu if chosen == "cpu" else mismatch_and_nll_reference
    batch, length, _ = hidden.shape
    mismatch, nll = run(
        hidden.reshape(batch * length, hidden.shape[2]), lm_head, reference.reshape(batch * length)
    )
    mismatch = mismatch.reshape(batch, length)
    # A position past the end that always counts: T where nothing diverges, and no special case for T = 0.
    divergent = F.pad(mismatch, (0, 1), value=True).to(torch.int8)
    return mismatch, divergent.argmax(1), mismatch.sum(1), nll.reshape(batch, length)


def _fake(
    hidden: torch.Tensor, lm_head: torch.Tensor, reference: torch.Tensor, backend: str | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    _check(hidden, lm_head, reference)
    per_sequence = (reference.shape[0],)
    return (
        reference.new_empty(reference.shape, dtype=torch.bool),
        reference.new_empty(per_sequence),
        reference.new_empty(per_sequence),
        reference.new_empty(reference.shape, dtype=torch.float32),
    )


_OPERATOR = register(
    "token_divergence(Tensor hidden, Tensor lm_head, Tensor reference, str? backend=None)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _run,
    _fake,
)
