"""Divergent tokens: where would this model have chosen another token than the reference?"""

from collections.abc import Callable
from typing import NamedTuple, overload

import torch
import torch.nn.functional as F

from dtm_fast.ops import backends, checks, native
from dtm_fast.ops.autocast import without_autocast
from dtm_fast.ops.certificate import Certificate
from dtm_fast.ops.certified_divergence import Mismatch, certified_mismatch
from dtm_fast.ops.library import is_recorded, register

_VOCABULARY_TILE = 128  # tokens of the smallest tile of a CUDA kernel (kSmallestVocabularyTile)
_ROW_TILE = 128  # rows of hidden that a CUDA kernel takes at a time
_SUMMARIES = 2**22  # summaries of one row of one tile held at a time: 12 bytes each, 48 MiB

_HOPPER_ELEMENTS = 8  # bfloat16 of the 16 bytes on which the rows of the kernel "hopper" begin

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
    instruction sets, but for AMX, which multiplies float32 as masked_linear does, and, in bfloat16, AVX512-BF16:
    these have their own and take denormal numbers as zero. Backend "cuda" sums in one order per kernel, and takes
    the kernel by the GPU, the dtype, D and the alignment of rows (bfloat16 in rows that begin on 16 bytes has one
    of its own on compute capability 9.0), not by T or V. Ties go to the lowest token id, a NaN is larger than
    every number, and nll is NaN where a logit is.

    Args:
        hidden: [B, T, D], float32 or bfloat16: what the final norm gives.
        lm_head: [V, D], in the dtype of hidden.
        reference: [B, T] int64, token ids in [0, V).
        certificate: Certificate.build of base hidden states near these and of this lm_head: tokens are then
            decided by proofs where possible. The answer of backends "cpu" and "cuda", which sum in one fixed
            order, is the same at every position; that of the others depends on the shape where logits all but tie.
        backend: None (the best), "cpu", "cuda", "triton" or "reference" (which alone has a backward, for nll).

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
        certified = _certified
        if torch.compiler.is_compiling():  # what is computed depends on values
            # A graph ends here. As a decorator this would import torch._dynamo, which takes a second, where nothing is
            # compiled.
            certified = torch.compiler.disable(_certified)
        return certified(hidden, lm_head, reference, certificate, backend)
    if is_recorded(hidden, lm_head, reference):
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
    mismatch = reference.new_empty(reference.shape, dtype=torch.bool)
    nll = reference.new_empty(reference.shape, dtype=torch.float32)
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


def mismatch_and_nll_cuda(
    hidden: torch.Tensor, lm_head: torch.Tensor, reference: torch.Tensor, kernel: str = "best"
) -> tuple[torch.Tensor, torch.Tensor]:
    """The CUDA kernels, of arguments that are checked; `kernel`: one of native.CUDA_KERNELS."""
    cuda, stream = native.cuda_call(hidden.device)
    hidden, lm_head = native.as_separate_rows(hidden), native.as_separate_rows(lm_head)
    reference = reference.contiguous()
    rows = reference.shape[0]
    mismatch = torch.empty(rows, dtype=torch.bool, device=hidden.device)
    nll = torch.empty(rows, dtype=torch.float32, device=hidden.device)
    if rows == 0:
        return mismatch, nll
    tiles = -(-lm_head.shape[0] // _VOCABULARY_TILE)
    # A whole number of the kernels' tiles of rows, so that the parts cost no more than the whole.
    most = min(rows, max(1, _SUMMARIES // (tiles * _ROW_TILE)) * _ROW_TILE)
    summaries = torch.empty((tiles, most, 3), dtype=torch.float32, device=hidden.device)
    own_logit = torch.empty(most, dtype=torch.float32, device=hidden.device)
    with native.on_device(hidden.device):
        for start in range(0, rows, most):
            part = slice(start, start + most)
            cuda.token_divergence(
                native.CUDA_KERNELS.index(kernel),
                native.FLOAT_TYPES[hidden.dtype],
                hidden[part].data_ptr(),
                hidden.stride(0),
                lm_head.data_ptr(),
                lm_head.stride(0),
                reference[part].data_ptr(),
                min(most, rows - start),
                *lm_head.shape,
                mismatch[part].data_ptr(),
                nll[part].data_ptr(),
                summaries.data_ptr(),
                own_logit.data_ptr(),
                stream,
            )
    return mismatch, nll


def _mismatch_and_nll_triton(
    hidden: torch.Tensor, lm_head: torch.Tensor, reference: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    from dtm_fast.triton_kernels.token_divergence import mismatch_and_nll as run

    return run(hidden, lm_head, reference)


_RUN: dict[str, RowsOp] = {
    "cpu": _mismatch_and_nll_cpu,
    "cuda": mismatch_and_nll_cuda,
    "triton": _mismatch_and_nll_triton,
    "reference": mismatch_and_nll_reference,
}


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


def _check_token_ids(name: str, reference: torch.Tensor, vocabulary: int) -> None:
    if reference.numel() == 0:
        return
    low, high = (int(each) for each in reference.aminmax())
    if low < 0 or high >= vocabulary:
        raise ValueError(f"{name}: expected token ids in [0, {vocabulary}), got ids from {low} to {high}")


def _prepare(
    hidden: torch.Tensor, lm_head: torch.Tensor, reference: torch.Tensor, backend: str | None
) -> str:
    """Check the arguments and say which backend runs."""
    _check(hidden, lm_head, reference)
    if backend != "reference":
        checks.no_gradient_needed("token_divergence", hidden, lm_head)
    chosen = backends.choose("token_divergence", backend, hidden.device, hidden.dtype, reference.numel())
    checks.contents(_check_token_ids, "reference", reference, lm_head.shape[0])
    return chosen


def _first_and_count(mismatch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    # A position past the end that always counts: T where nothing diverges, and no special case for T = 0.
    divergent = F.pad(mismatch.view(torch.int8), (0, 1), value=1)
    return divergent.argmax(1), mismatch.sum(1)


def _run(
    hidden: torch.Tensor, lm_head: torch.Tensor, reference: torch.Tensor, backend: str | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    run = _RUN[_prepare(hidden, lm_head, reference, backend)]
    mismatch, nll = run(hidden.flatten(0, 1), lm_head, reference.flatten())
    mismatch = mismatch.reshape(reference.shape)
    return mismatch, *_first_and_count(mismatch), nll.reshape(reference.shape)


def _mismatch_as_of_all_cuda(hidden: torch.Tensor, lm_head: torch.Tensor) -> Mismatch:
    """The CUDA op on copies of rows of these, by the kernel that takes all of them: its logits, to the last bit."""
    hidden, lm_head = native.as_separate_rows(hidden), native.as_separate_rows(lm_head)
    cuda, _ = native.cuda_call(hidden.device)
    with native.on_device(hidden.device):
        on_hopper = cuda.token_divergence_possible(
            native.CUDA_KERNELS.index("hopper"),
            native.FLOAT_TYPES[hidden.dtype],
            hidden.data_ptr(),
            hidden.stride(0),
            lm_head.data_ptr(),
            lm_head.stride(0),
            0,
            hidden.shape[0],
            *lm_head.shape,
            *(0,) * 4,
        )
    # Copies lie close together, so that rows which began on 16 bytes need not do so any more.
    apart = -hidden.shape[1] % _HOPPER_ELEMENTS if on_hopper else 0

    def rows_at(rows: torch.Tensor) -> torch.Tensor:
        return F.pad(rows, (0, apart))[:, : rows.shape[1]]

    def mismatch(some: torch.Tensor, tokens: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        if apart:
            some, tokens = rows_at(some), tokens if tokens is lm_head else rows_at(tokens)
        return mismatch_and_nll_cuda(some, tokens, reference, "hopper" if on_hopper else "mma")[0]

    return mismatch


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
    chosen = _prepare(hidden, lm_head, reference, backend)
    certificate.check(hidden, lm_head)
    rows = hidden.flatten(0, 1)
    mismatch, settled = certified_mismatch(
        rows,
        lm_head,
        reference.flatten(),
        certificate,
        _mismatch_as_of_all_cuda(rows, lm_head) if chosen == "cuda" else lambda *some: _RUN[chosen](*some)[0],
        chosen,
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


_OPERATOR = register(
    "token_divergence(Tensor hidden, Tensor lm_head, Tensor reference, str? backend=None)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _run,
    _fake,
)
