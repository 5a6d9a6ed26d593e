"""int8_linear beside float32, bfloat16, oneDNN, FBGEMM, torch._int_mm, torch.compile and torchao."""

from collections.abc import Callable

import torch

from benchmarks import torch_peers
from benchmarks.case import OURS, OUT_OF_CACHE_BYTES, Case, Contest
from benchmarks.correctness import Complaint, bit_equal, relative_error
from benchmarks.goals import GeometricMeanGoal, Goal
from benchmarks.interleave import Contender, prepared
from benchmarks.limits import INSTRUCTIONS, reading
from dtm_fast import ops
from dtm_fast.ops import large_pages
from dtm_fast.ops.int8_linear import int8_linear_reference

OPERATION = "int8_linear"
SHAPES = [  # (M, K, N)
    (2048, 576, 576),
    (2048, 576, 1536),
    (2048, 1536, 576),
    (256, 4096, 4096),
    (256, 4096, 11008),
    (16, 4096, 4096),
    (1, 4096, 4096),
]
FBGEMM, EAGER, COMPILED = "FBGEMM", "eager W8A8", "compiled W8A8"
# Beside us in every round, because the bandwidth of a shared machine drifts more than anything else.
READING = "reading the weight"
MEAN_GOALS = [
    GeometricMeanGoal("geometric mean ≥ 1.2 × FBGEMM", OPERATION, FBGEMM, 1.2),
    GeometricMeanGoal("geometric mean ≥ 5 × eager W8A8", OPERATION, EAGER, 5.0),
]
# Against the twin. Quantizing activations per token errs by about 0.008 of the norm; FBGEMM's one scale for the
# whole tensor by about twice that; a float contender does not make the twin's error; bfloat16 adds 2 ** -9 per value.
_SAME_ARITHMETIC = relative_error(0.003)
_NEAR = relative_error(0.03)


def cases(compiled: bool = True) -> list[Case]:
    return [_case(*shape, dtype, compiled) for dtype in (torch.float32, torch.bfloat16) for shape in SHAPES]


def _case(M: int, K: int, N: int, dtype: torch.dtype, compiled: bool) -> Case:  # noqa: N803
    goals = [Goal("≥ 1.0 × FBGEMM", "speed", (FBGEMM,), 1.0)]
    if M >= 256:
        goals.append(Goal("≥ 70% of the int8 VNNI peak", "share", ("int8_vnni",), 0.70))
        # The plan speaks of VNNI, of a machine without AMX; where there is AMX, it is the peak that counts.
        goals.append(Goal("≥ 70% of the int8 AMX peak", "share", ("int8_amx",), 0.70, if_available=True))
    if M == 1:
        goals.append(Goal("≥ 85% of the speed of reading the weight", "speed", (READING,), 0.85))
    return Case(
        OPERATION,
        M,
        K,
        N,
        dtype,
        lambda case: _build(case, compiled),
        flops=2.0 * M * K * N,
        bytes=float(N * K + 4 * N + dtype.itemsize * M * (K + N)),
        arithmetic=INSTRUCTIONS[torch.int8],
        goals=tuple(goals),
        note="weights out of cache" if M <= 16 else "",
        out_of_cache=OUT_OF_CACHE_BYTES if M <= 16 else 0,
    )


def _build(case: Case, compiled: bool) -> Contest:
    generator = torch.Generator().manual_seed(case.M + case.N)
    weight = torch.randn(case.N, case.K, generator=generator)
    x = torch.randn(case.M, case.K, generator=generator).to(case.dtype)
    qweight, scale = ops.quantize_int8(weight)
    # Where Int8Linear has them; for all who take them as they are.
    qweights = [large_pages.moved(qweight) for _ in range(case.copies(qweight.nbytes))]

    def quantized(name: str, prepare: Callable[..., torch_peers.Call], complaint: Complaint) -> Contender:
        return prepared(name, [lambda each=each: prepare(x, each, scale) for each in qweights], complaint)

    def floating(name: str, prepare: Callable[..., torch_peers.Call], dtype: torch.dtype) -> Contender:
        """What int8 replaces: the dequantized weights in `dtype`, x given in that dtype."""
        dense = (qweight.float() * scale[:, None]).to(dtype)
        typed_x = x.to(dtype)
        count = case.copies(dense.nbytes)
        return prepared(name, [lambda: prepare(typed_x, dense.clone()) for _ in range(count)], _NEAR)

    contenders = [
        quantized(OURS, lambda x, q, s: lambda: ops.int8_linear(x, q, s), bit_equal),
        quantized(FBGEMM, torch_peers.fbgemm, _NEAR),
        quantized(EAGER, torch_peers.eager_w8a8, _SAME_ARITHMETIC),
        quantized(COMPILED, torch_peers.compiled_w8a8(), _SAME_ARITHMETIC)
        if compiled
        else Contender(COMPILED, unavailable="left out (--quick)"),
        floating("F.linear float32", torch_peers.dense, torch.float32),
        floating("oneDNN float32", torch_peers.onednn, torch.float32),
        floating("F.linear bfloat16", torch_peers.dense, torch.bfloat16),
    ]
    if case.M == 1:
        contenders.append(prepared(READING, [lambda q=q: reading(q) for q in qweights], lambda *_: None))
    reason = torch_peers.why_no_torchao()
    contenders.append(
        Contender("torchao W8A8", unavailable=reason)
        if reason
        else floating("torchao W8A8", torch_peers.torchao_w8a8, case.dtype)
    )
    return Contest(contenders, int8_linear_reference(x, qweight, scale, None))
