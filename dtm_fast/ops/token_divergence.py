"""Divergent tokens: where would this model have chosen another token than the reference?"""

from collections.abc import Callable
from typing import NamedTuple, overload

import torch
import torch.nn.functional as F

from dtm_fast.ops import backends, checks, native
from dtm_fast.ops.autocast import without_autocast
from dtm_fast.ops.certificate import Certificate
from dtm_fast.ops.certified_divergence import certified_mismatch
from dtm_fast.ops.library import register

_REFERENCE_ROWS = 64  # tokens whose logits the reference twin holds at a time

RowsOp = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


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


class CertifiedDivergence(NamedTuple):
    """Where B sequences of T tokens diverge from their references; proofs say nothing about nll."""

    mismatch: torch.Tensor
    """bool [B, T]: the greedy token is not the reference."""
    first: torch.Tensor
    """int64 [B]: the first divergent position, T where there is none."""
    count: torch.Tensor  # type: ignore[assignment]  # hides tuple.count
    """int64 [B]: the number of divergent positions."""
    settled: dict[str, int]
    """How many of the B * T positions each stage settled, in order: "radius", "nearest 16", … of the
    certificate's k, "int8 screen", "full head"."""


@overload
def token_divergence(
    hidden: torch.Tensor,
    lm_head: torch.Tensor,
    reference: torch.Tensor,
    *,
    certificate: None = None,
    backend: str | None = None,
) -> Divergence: ...
@overload
def token_divergence(
    hidden: torch.Tensor,
    lm_head: torch.Tensor,
    reference: torch.Tensor,
    *,
    certificate: Certificate,
    backend: str | None = None,
) -> CertifiedDivergence: ...
def token_divergence(
    hidden: torch.Tensor,
    lm_head: torch.Tensor,
    reference: torch.Tensor,
    *,
    certificate: Certificate | None = None,
    backend: str | None = None,
) -> Divergence | CertifiedDivergence:
    """Compare greedy tokens with reference tokens, without ever holding the logits of the vocabulary.

    Equals, with `logits = F.linear(hidden, lm_head)`,
    `mismatch = logits.argmax(-1) != reference` and
    `nll = logits.float().logsumexp(-1) - logits.float().gather(-1, reference[..., None])[..., 0]`.
    Logits are summed in float32 and rounded to the dtype of hidden, as a model that stores them would see
    them. On the CPU the order of a sum depends on neither the batch nor the threads; it is the same for all
    instruction sets, but for bfloat16 on AVX512-BF16 and on AMX, which have their own and take denormal numbers
    as zero. Ties go to the lowest token id, a NaN is larger than every number, and nll is NaN where a logit is.

    Args:
        hidden: [B, T, D], float32 or bfloat16: what the final norm gives.
        lm_head: [V, D], in the dtype of hidden.
        reference: [B, T] int64, token ids in [0, V).
        certificate: Certificate.build of base hidden states near these and of this lm_head: tokens are then
            decided by proofs where possible. The answer is the same at every position and backend "cpu", which
            sums in one fixed order; that of backend "reference" depends on the shape where logits all but tie.
        backend: None (the best), "cpu" or "reference" (which alone has a backward, for nll).

    Returns:
        Divergence(mismatch, first, count, nll); with a certificate, which cannot know nll,
        CertifiedDivergence(mismatch, first, count, settled). torch.compile does not see into the latter.

    Raises:
        TypeError: an argument is no dense tensor of such a dtype.
        ValueError: shapes or devices do not fit, reference holds an id outside the vocabulary;
            backend is unknown; the certificate is for another lm_head or shape.
        RuntimeError: backend cannot run; autograd would need a backward and backend is not "reference".

    Source: Deiseroth et al. 2023, "Divergent Token Metrics" (FDT is `first`, SDT is `count`).
    """
    if certificate is not None:
        return _certified_eagerly(hidden, lm_head, reference, certificate, backend)
    if torch.compiler.is_compiling():
        checks.no_gradient_needed(
            "token_divergence", hidden, lm_head
        )  # the operator has none for any backend
        return Divergence(*_OPERATOR(hidden, lm_head, reference, backend))
    return Divergence(*_run(hidden, lm_head, reference, backend))


@without_autocast
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


def _prepare(
    hidden: torch.Tensor, lm_head: torch.Tensor, reference: torch.Tensor, backend: str | None
) -> RowsOp:
    """Check the arguments and say what runs."""
    _check(hidden, lm_head, reference)
    if backend != "reference":
        checks.no_gradient_needed("token_divergence", hidden, lm_head)
    chosen = backends.choose("token_divergence", backend, hidden.device)
    _check_token_ids(reference, lm_head.shape[0])
    return _mismatch_and_nll_cpu if chosen == "cpu" else mismatch_and_nll_reference


def _first_and_count(mismatch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    # A position past the end that always counts: T where nothing diverges, and no special case for T = 0.
    divergent = F.pad(mismatch, (0, 1), value=True).to(torch.int8)
    return divergent.argmax(1), mismatch.sum(1)


def _run(
    hidden: torch.Tensor, lm_head: torch.Tensor, reference: torch.Tensor, backend: str | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    run = _prepare(hidden, lm_head, reference, backend)
    mismatch, nll = run(hidden.flatten(0, 1), lm_head, reference.flatten())
    mismatch = mismatch.reshape(reference.shape)
    return mismatch, *_first_and_count(mismatch), nll.reshape(reference.shape)


@torch.no_grad()
def _certified(
    hidden: torch.Tensor,
    lm_head: torch.Tensor,
    reference: torch.Tensor,
    certificate: object,
    backend: str | None,
) -> CertifiedDivergence:
    if not isinstance(certificate, Certificate):
        raise TypeError(f"certificate: expected a Certificate or None, got {type(certificate).__name__}")
    run = _prepare(hidden, lm_head, reference, backend)
    certificate.check(hidden, lm_head)
    mismatch, settled = certified_mismatch(
        hidden.flatten(0, 1),
        lm_head,
        reference.flatten(),
        certificate,
        lambda *rows: run(*rows)[0],
        native_code=run is _mismatch_and_nll_cpu,
    )
    mismatch = mismatch.reshape(reference.shape)
    return CertifiedDivergence(mismatch, *_first_and_count(mismatch), settled)


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


# The stages depend on the data: torch.compile leaves its graph here.
_certified_eagerly: Callable[..., CertifiedDivergence] = torch.compiler.disable(_certified)

_OPERATOR = register(
    "token_divergence(Tensor hidden, Tensor lm_head, Tensor reference, str? backend=None)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _run,
    _fake,
)
