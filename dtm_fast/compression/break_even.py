"""Which of our float layers is faster than torch.nn.Linear: thresholds that were measured.

On a Xeon with AMX (family 6, model 207), 2026-11-27: the products of SmolLM2-135M's decoder layers on one thread
(`python -m benchmarks.break_even`), and whole models of it on two; for lesser instruction sets torch's own libraries
(oneDNN, MKL) were held to them as well. On AMD CPUs, where MKL is slower, more would pay (docs/performance.md).
"""

from dataclasses import dataclass

import torch

from dtm_fast import nn
from dtm_fast.ops import backends, native

PROMPT, WRITTEN = 256, 64
"""What has to be faster in all: reading a prompt of so many tokens at once, and then so many one by one."""

SMALLEST = {torch.float32: 2**18, torch.bfloat16: 2**15}
"""Weights of fewer entries stay with torch: calling our operation takes longer than the product."""


@dataclass(frozen=True)
class BreakEven:
    """Densities below which a SparseLinear is faster than a dense layer, 1 where it always is.

    Attributes:
        token: for one token.
        prompt: for PROMPT tokens.
        both: for a prompt and the tokens written after it.
        full: whether for both a MaskedLinear that keeps all weights is faster, too.
    """

    token: float
    prompt: float
    both: float
    full: bool = False


# By whole models on two threads: there a dense product of one token gains more by the second thread than a sparse one,
# which is faster below 0.5 on one. In all 0.90 as fast at a density of 0.4, 1.04 at 0.35.
_AVX512 = BreakEven(0.35, 0.6, 0.37)
_AVX512_PAIRS = BreakEven(0.5, 1.0, 0.6, full=True)  # torch has no product of bfloat16 there but a slow one
TABLE = {
    (torch.float32, "avx2"): BreakEven(0.2, 0.5, 0.2),
    (torch.float32, "avx512"): _AVX512,
    (torch.float32, "avx512_vnni"): _AVX512,
    (torch.float32, "avx512_bf16"): _AVX512,
    (torch.float32, "amx"): _AVX512,
    # A MaskedLinear that keeps all reads prompts 4 times as fast here, but takes 1.6 times as long for one token.
    (torch.bfloat16, "avx2"): BreakEven(0.15, 1.0, 0.6),
    (torch.bfloat16, "avx512"): _AVX512_PAIRS,
    (torch.bfloat16, "avx512_vnni"): _AVX512_PAIRS,
    (torch.bfloat16, "avx512_bf16"): BreakEven(0.65, 0.9, 0.7, full=True),
    # By whole models: at 0.5 writing gains 0 to 10%, within the noise, and prompts take twice as long.
    (torch.bfloat16, "amx"): BreakEven(0.4, 0.1, 0.4),
}


def faster_layer(weight: torch.Tensor) -> tuple[type[nn.SparseLinear] | type[nn.MaskedLinear] | None, str]:
    """The layer that multiplies by a weight faster than torch.nn.Linear does, and why it, or why none.

    Args:
        weight: float [N, K]; what is 0 need not be multiplied. nn.MaskedLinear stands for one that keeps all.
    """
    reason = _why_no_kernel(weight)
    if reason is not None:
        return None, reason
    density = density_of(weight)
    about = f"density {density:.2f}"
    if weight.numel() < SMALLEST[weight.dtype]:
        return None, f"{about}; a product of {weight.numel()} weights is too small for a kernel to gain"
    even = TABLE[weight.dtype, native.cpu_isa()]
    where = f"({_short(weight.dtype)}, {native.cpu_isa()})"
    if density < even.both:
        return nn.SparseLinear, (
            f"{about}; a sparse product is faster below {even.token:g} for one token, below {even.prompt:g} "
            f"for a prompt of {PROMPT} {where}"
        )
    if even.full:
        return nn.MaskedLinear, f"{about}; our dense product is faster than torch's for one token {where}"
    return None, f"{about}; a sparse product is faster below {even.both:g}, no dense one of ours {where}"


def density_of(weight: torch.Tensor) -> float:
    """The share of a weight's entries that are not 0; 1 where there are none."""
    return int(weight.count_nonzero()) / weight.numel() if weight.numel() else 1.0


def _why_no_kernel(weight: torch.Tensor) -> str | None:
    """Why our float kernels cannot multiply by a weight; None if they can."""
    backend, reason = backends.default("sparse_linear", weight.device.type)
    if backend == "reference":
        return f"our kernels cannot run: {reason}"
    if weight.dtype not in SMALLEST:
        return f"no kernel for {_short(weight.dtype)}"
    return None


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
