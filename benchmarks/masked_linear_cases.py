"""masked_linear, one mask and eight, beside what one would write in torch and beside the dense product."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from benchmarks import torch_peers
from benchmarks.case import OURS, OUT_OF_CACHE_BYTES, Case, Contest
from benchmarks.correctness import relative_error
from benchmarks.goals import Goal
from benchmarks.int8_linear_cases import SHAPES
from benchmarks.interleave import Contender, prepared
from benchmarks.limits import INSTRUCTIONS
from dtm_fast import ops
from dtm_fast.ops.masked_linear import masked_linear_reference

OPERATION = "masked_linear"
VARIANTS = 8
SPARSITY = 0.5
MASKED_COPY, DENSE, ONEDNN = "F.linear(x, w * mask)", "F.linear", "oneDNN"
ONEDNN_TENSORS = "aten::mkldnn_linear"
SINGLE_CALLS, INDEPENDENT = "8 single calls", "masked_linear, not nested"
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-3}


def cases() -> list[Case]:
    single = [
        _single(M, K, N, dtype)
        for dtype in (torch.float32, torch.bfloat16)
        for M, K, N in [*SHAPES[:-1], (4, 4096, 4096), SHAPES[-1]]
    ]
    return single + [
        _several(M, K, N, dtype, nested)
        for dtype in (torch.float32, torch.bfloat16)
        for M, K, N, nested in [
            (1, 4096, 4096, False),
            (16, 4096, 4096, False),
            (2048, 576, 1536, False),
            (2048, 576, 1536, True),
        ]
    ]


def _single(M: int, K: int, N: int, dtype: torch.dtype) -> Case:  # noqa: N803
    if M <= 16:
        goals = (
            Goal("≥ 10 × F.linear(x, w * mask)", "speed", (MASKED_COPY,), 10.0),
            Goal(
                "≤ 1.15 × the time of the dense product",
                "time",
                (DENSE, ONEDNN, ONEDNN_TENSORS),
                1.15,
                at_least=False,
            ),
        )
    elif dtype == torch.float32:
        goals = (
            Goal("≥ 2 × F.linear(x, w * mask)", "speed", (MASKED_COPY,), 2.0),
            Goal("≥ 0.9 × the speed of dense oneDNN", "speed", (ONEDNN, ONEDNN_TENSORS), 0.9),
        )
    else:
        goals = ()
    return Case(
        OPERATION,
        M,
        K,
        N,
        dtype,
        _build,
        flops=2.0 * M * K * N,
        bytes=float(dtype.itemsize * (N * K + M * (K + N)) + N * K // 8),
        arithmetic=INSTRUCTIONS[dtype],
        goals=goals,
        sparsity=SPARSITY,
        note="weights out of cache" if M <= 16 else "",
        out_of_cache=OUT_OF_CACHE_BYTES if M <= 16 else 0,
    )


def _several(M: int, K: int, N: int, dtype: torch.dtype, nested: bool) -> Case:  # noqa: N803
    goals: tuple[Goal, ...] = ()
    if M == 1:
        goals = (Goal("≤ 0.35 × the time of 8 single calls", "time", (SINGLE_CALLS,), 0.35, at_least=False),)
    elif M == 16:
        goals = (Goal("≤ 0.75 × the time of 8 single calls", "time", (SINGLE_CALLS,), 0.75, at_least=False),)
    elif nested:
        goals = (
            Goal(
                "≤ 3 × the time of one dense product",
                "time",
                (DENSE, ONEDNN, ONEDNN_TENSORS),
                3.0,
                at_least=False,
            ),
        )
    return Case(
        OPERATION,
        M,
        K,
        N,
        dtype,
        _build,
        flops=2.0 * M * K * N * VARIANTS,
        bytes=float(dtype.itemsize * (N * K + M * (K + VARIANTS * N)) + VARIANTS * N * K // 8),
        arithmetic=INSTRUCTIONS[dtype],
        goals=goals,
        variants=VARIANTS,
        sparsity=SPARSITY,
        note=f"{VARIANTS} {'nested' if nested else 'independent'} masks",
        out_of_cache=OUT_OF_CACHE_BYTES if M <= 16 else 0,
    )


def _masks(case: Case, weight: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """bool [N, K] or [V, N, K]."""
    if case.variants == 1:
        return torch.rand(weight.shape, generator=generator) >= case.sparsity
    if "nested" not in case.note:
        return torch.rand(case.variants, *weight.shape, generator=generator) >= case.sparsity
    magnitudes = weight.float().abs()
    levels = torch.linspace(0.1, 0.8, case.variants)
    thresholds = magnitudes.flatten().sort().values[(levels * (magnitudes.numel() - 1)).long()]
    return torch.stack([magnitudes > each for each in thresholds])


def _build(case: Case) -> Contest:
    generator = torch.Generator().manual_seed(case.M + case.N)
    weight = torch.randn(case.N, case.K, generator=generator).to(case.dtype)
    x = torch.randn(case.M, case.K, generator=generator).to(case.dtype)
    masks = _masks(case, weight, generator)
    packed = ops.pack_mask(masks)
    expected = masked_linear_reference(x, weight, packed, None)
    complaint = relative_error(_TOLERANCE[case.dtype])
    copies = case.copies(weight.nbytes + packed.nbytes)
    sets = [(weight, packed), *((weight.clone(), packed.clone()) for _ in range(copies - 1))]

    nested = "nested" in case.note

    def ours(w: torch.Tensor, m: torch.Tensor, nested: bool = nested) -> Callable[[], torch.Tensor]:
        return lambda: ops.masked_linear(x, w, m, nested=nested)

    contenders = [Contender(OURS, tuple(ours(w, m) for w, m in sets), complaint)]
    if case.variants == 1:
        bools = [masks, *(masks.clone() for _ in range(copies - 1))]
        contenders.append(
            Contender(
                MASKED_COPY,
                tuple(lambda w=w, m=m: F.linear(x, w * m) for (w, _), m in zip(sets, bools, strict=True)),
                complaint,
            )
        )
    else:

        def one_by_one(w: torch.Tensor, m: torch.Tensor) -> Callable[[], torch.Tensor]:
            return lambda: torch.stack([ops.masked_linear(x, w, each) for each in m])

        contenders.append(Contender(SINGLE_CALLS, tuple(one_by_one(w, m) for w, m in sets), complaint))
        if nested:
            contenders.append(Contender(INDEPENDENT, tuple(ours(w, m, False) for w, m in sets), complaint))
    # The dense product computes something else, so it is checked against its own float64 result, on some columns.
    some = slice(0, min(64, case.N))
    truth = x.double() @ weight[some].double().T

    def dense_complaint(result: torch.Tensor, _expected: torch.Tensor) -> str | None:
        plain = result.to_dense() if result.layout == torch._mkldnn else result
        return complaint(plain[:, some], truth)

    for name, prepare in (
        (DENSE, torch_peers.dense),
        (ONEDNN, torch_peers.onednn),
        (ONEDNN_TENSORS, torch_peers.onednn_tensors),
    ):
        contenders.append(
            prepared(name, [lambda w=w, p=prepare: p(x, w) for w, _ in sets], dense_complaint)  # type: ignore[misc]
        )
    return Contest(contenders, expected)
