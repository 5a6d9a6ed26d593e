"""token_divergence on a GPU beside the product and its argmax, with the memory that it takes, and what proofs save."""

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cuda.contest import OURS, Call, Case, Contest
from benchmarks.cuda.linear_cases import triton_or_none
from dtm_fast import ops
from dtm_fast.ops.token_divergence import mismatch_and_nll_cuda

# Tokens, hidden size and vocabulary: Llama 3's, and Llama 2's.
SIZES = ((4096, 4096, 128_256), (4096, 4096, 32_000))
_NEAR = (
    2.0**-5
)  # logits as large as these are rounded to 2^-6: closer ones may fall the other way in another order
_CLEAR = 8.0  # by about how many logits a token wins there
_MOVED = 0.02  # how far states are moved for the proofs, as a share of their norm


def eager(hidden: Tensor, head: Tensor, reference: Tensor) -> Tensor:
    return F.linear(hidden, head).argmax(-1) != reference


@cache
def compiled() -> Callable[..., Tensor]:
    return torch.compile(eager, dynamic=False)


def inputs(tokens: int, depth: int, vocabulary: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, a head, what it chooses in float32 with a third of it replaced, and where that is nearly a tie."""
    hidden = torch.randn(tokens, depth, device="cuda").bfloat16()
    head = (torch.randn(vocabulary, depth, device="cuda") / depth**0.5).bfloat16()
    values, reference = [], []
    for part in hidden.split(512):
        top = F.linear(part.float(), head.float()).topk(2)
        values.append(top.values)
        reference.append(top.indices[:, 0])
    apart = torch.cat(values).diff(dim=1)[:, 0].abs()
    ids = torch.cat(reference)
    ids[::3] = (ids[::3] + torch.randint(1, vocabulary, ids[::3].shape, device="cuda")) % vocabulary
    return hidden, head, ids, apart <= _NEAR


def contest(tokens: int, depth: int, vocabulary: int, with_compiled: bool) -> Contest:
    hidden, head, reference, tied = inputs(tokens, depth, vocabulary)
    replaced = torch.zeros(tokens, dtype=torch.bool, device="cuda")
    replaced[::3] = True

    def complaint(result: Tensor, expected: Tensor) -> str | None:
        wrong = int(((result != expected) & ~tied).sum())
        return f"{wrong} of {tokens} positions are wrong that are no ties" if wrong else None

    def ours(kernel: str) -> Callable[[int], Call]:
        return lambda copy: lambda: mismatch_and_nll_cuda(hidden, head, reference, kernel)[0]

    contenders: dict[str, Callable[[int], Call]] = {
        OURS: ours("best"),
        "mma": ours("mma"),
        "matmul and argmax, eager": lambda copy: partial(eager, hidden, head, reference),
    }
    if with_compiled:
        contenders["matmul and argmax, compiled"] = lambda copy: partial(compiled(), hidden, head, reference)
    triton = triton_or_none("token_divergence", "mismatch_and_nll")
    if triton is not None:
        contenders["triton"] = lambda copy: lambda: triton(hidden, head, reference)[0]
    return Contest(
        "token_divergence",
        "bfloat16",
        {"T": tokens, "D": depth, "V": vocabulary},
        contenders,
        lambda copy: replaced,
        complaint,
        (tokens + vocabulary) * depth * 2,
        2 * tokens * depth * vocabulary,
        {name: 1.0 for name in contenders if name.startswith("matmul")},
    )


def contests(quick: bool) -> Iterator[Case]:
    for size in SIZES[1:] if quick else SIZES:
        yield partial(contest, *size, with_compiled=not quick)


def median_seconds(call: Callable[[], Any]) -> float:
    times = []
    for _ in range(9):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1000)
    return sorted(times)[len(times) // 2]


def certified(quick: bool) -> dict[str, Any]:
    """What proofs save where states are near the base's, and the memory of the full op above its inputs."""
    size = SIZES[1] if quick else SIZES[0]
    hidden, head, ids, _ = inputs(*size)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    ops.token_divergence(hidden[None], head, ids[None], backend="cuda")
    memory = torch.cuda.max_memory_allocated() - before
    noise = torch.randn(hidden.shape, device="cuda") * _MOVED
    # Most tokens have a clear winner in a language model; in random logits none has.
    clear = hidden.float() + _CLEAR * head[ids].float()
    certificate = ops.Certificate.build(clear.bfloat16()[None], head)
    reference = certificate.top
    moved = (clear + noise).bfloat16()[None]
    full = partial(ops.token_divergence, moved, head, reference[None], backend="cuda")
    proved = partial(
        ops.token_divergence, moved, head, reference[None], certificate=certificate, backend="cuda"
    )
    found, seconds = proved(), {"full": median_seconds(full), "certified": median_seconds(proved)}
    return {
        **dict(zip(("T", "D", "V"), size, strict=True)),
        "memory_mib": memory / 2**20,
        "seconds": seconds,
        "ratio": seconds["full"] / seconds["certified"],
        "settled": found.settled,
        "differing": int((full().mismatch != found.mismatch).sum()),
    }
