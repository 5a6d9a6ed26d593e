"""token_divergence beside torch's product and argmax, with the memory that it takes."""

import json
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks import torch_peers
from benchmarks.case import OURS, SHORT_DTYPE, Case, Contest
from benchmarks.correctness import relative_error, share_of_positions
from benchmarks.goals import Goal
from benchmarks.interleave import Contender, prepared, reason_of
from benchmarks.limits import INSTRUCTIONS
from dtm_fast import ops
from dtm_fast.ops.token_divergence import Divergence, mismatch_and_nll_reference

OPERATION = "token_divergence"
T = 2048
HEADS = [(576, 49_152), (2048, 128_256)]  # (D, V)
FULL, TILED, ONEDNN = "F.linear + argmax", "F.linear + argmax, 128 tokens at a time", "oneDNN + argmax"
PEAK = "peak_extra_mib"
_NLL_ROWS = 64
# Positions whose two best logits are as close as summation orders differ: rare in float32; in bfloat16, where
# rounded logits tie often, a value beside a rounding boundary decides.
_TOLERANCE = {torch.float32: 0.001, torch.bfloat16: 0.01}


def cases(large: bool = True) -> list[Case]:
    return [
        _case(depth, vocabulary, dtype)
        for depth, vocabulary in (HEADS if large else HEADS[:1])
        for dtype in (torch.float32, torch.bfloat16)
    ]


def _case(depth: int, vocabulary: int, dtype: torch.dtype) -> Case:
    return Case(
        OPERATION,
        T,
        depth,
        vocabulary,
        dtype,
        _build,
        flops=2.0 * T * depth * vocabulary,
        bytes=float(dtype.itemsize * (vocabulary * depth + T * depth) + 8 * T),
        arithmetic=INSTRUCTIONS[dtype],
        goals=(
            Goal("≥ 1.0 × the fastest torch way", "speed", (FULL, TILED, ONEDNN), 1.0),
            Goal("peak extra memory ≤ 64 MiB", "extra", (PEAK,), 64.0, at_least=False),
        ),
        extra=lambda case: {PEAK: peak_extra_mib(case)},
    )


def _build(case: Case) -> Contest:
    generator = torch.Generator().manual_seed(case.K)
    hidden = torch.randn(1, case.M, case.K, generator=generator).to(case.dtype)
    head = torch.randn(case.N, case.K, generator=generator).div_(case.K**0.5).to(case.dtype)
    greedy = torch.cat([F.linear(rows, head).argmax(-1) for rows in hidden[0].split(_NLL_ROWS)])[None]
    other = torch.randint(case.N, greedy.shape, generator=generator)
    reference = torch.where(torch.rand(greedy.shape, generator=generator) < 0.5, greedy, other)
    expected = greedy != reference
    _, nll = mismatch_and_nll_reference(hidden[0, :_NLL_ROWS], head, reference[0, :_NLL_ROWS])
    same_positions = share_of_positions(_TOLERANCE[case.dtype])
    same_nll = relative_error(1e-5 if case.dtype == torch.float32 else 5e-3)

    def our_complaint(result: Divergence, expected: torch.Tensor) -> str | None:
        return same_positions(result.mismatch, expected) or same_nll(result.nll[:, :_NLL_ROWS], nll[None])

    def tiled() -> torch.Tensor:
        return (
            torch.cat([F.linear(rows, head).argmax(-1) for rows in hidden[0].split(128)])[None] != reference
        )

    def with_onednn() -> torch_peers.Call:
        product = torch_peers.onednn(hidden, head)
        return lambda: product().argmax(-1) != reference

    return Contest(
        [
            Contender(OURS, (lambda: ops.token_divergence(hidden, head, reference),), our_complaint),
            Contender(FULL, (lambda: F.linear(hidden, head).argmax(-1) != reference,), same_positions),
            Contender(TILED, (tiled,), same_positions),
            prepared(ONEDNN, [with_onednn], same_positions),
        ],
        expected,
    )


def peak_extra_mib(case: Case) -> float | str:
    """What one call adds to the resident memory at most, in a fresh process, in MiB; or why that is not known."""
    arguments = [case.M, case.K, case.N, SHORT_DTYPE[case.dtype], torch.get_num_threads()]
    try:
        ended = subprocess.run(
            [sys.executable, "-m", "benchmarks.peak_memory", *map(str, arguments)],
            cwd=Path(__file__).resolve().parent.parent,
            capture_output=True,
            text=True,
            check=True,
            timeout=600,
        )
        return float(json.loads(ended.stdout)["peak_extra_mib"])
    except subprocess.CalledProcessError as error:
        return f"the child process failed: {(error.stderr.splitlines() or ['no message'])[-1][:150]}"
    except (subprocess.TimeoutExpired, OSError, ValueError) as error:
        return reason_of(error)
