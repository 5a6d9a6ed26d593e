"""The linear layers of a GPU beside their peers, on the shapes of Llama 2."""

import importlib
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.correctness import bit_equal, relative_error
from benchmarks.cuda.contest import OURS, Case, Contest, copies_of
from dtm_fast import ops
from dtm_fast.ops.bitmap_linear import bitmap_linear
from dtm_fast.ops.int8_linear import int8_linear_cuda, int8_linear_reference
from dtm_fast.ops.masked_linear import masked_linear_cuda

# [N, K] of Llama-2-7B and -13B: q, k and v at once; gate and up at once; down; o.
SEVEN = ((12288, 4096), (22016, 4096), (4096, 11008), (4096, 4096))
THIRTEEN = ((15360, 5120), (27648, 5120), (5120, 13824), (5120, 5120))
FEW = (1, 16)
MANY = (4096, 1024)
# [M, N, K]: each takes torch.compile some seconds.
COMPILED = ((4096, *SEVEN[1]), (1024, *SEVEN[1]), (4096, *SEVEN[3]), (4096, *THIRTEEN[0]))
DENSITIES = (0.5, 0.25)
SEVERAL = 8  # masks in one pass
_ROUNDED = 2.0**-8  # bfloat16 keeps eight bits

Make = Callable[[int], Callable[[], Tensor]]


def activations(rows: int, depth: int) -> list[Tensor]:
    """Two sets of tokens with a few large columns, as those of language models have."""
    found = torch.randn(2, rows, depth, device="cuda")
    found[..., :: max(depth // 8, 1)] *= 20
    return list(found.bfloat16())


def weights(columns: int, depth: int) -> Tensor:
    return (torch.randn(columns, depth, device="cuda") / depth**0.5).bfloat16()


def of(*tensors: list[Tensor], call: Callable[..., Tensor]) -> Make:
    """A contender: `call` on copy i of each list."""
    return lambda copy: partial(call, *(each[copy % len(each)] for each in tensors))


def rounded(result: Tensor, expected: Tensor) -> str | None:
    """Right but for one rounding to bfloat16; the expected one is float32."""
    return relative_error(_ROUNDED)(result.float(), expected)


def triton_or_none(module: str, function: str | None = None) -> Callable[..., Any] | None:
    """A function of dtm_fast.triton_kernels, by default that of the module's name; None without triton."""
    try:
        return getattr(importlib.import_module(f"dtm_fast.triton_kernels.{module}"), function or module)
    except ImportError:
        return None


def eager_int8(x: Tensor, qweight: Tensor, scale: Tensor) -> Tensor:
    """What one writes with torch._int_mm; it needs more than 16 rows."""
    scale_x = x.float().abs().amax(-1, keepdim=True) / 127
    qx = torch.round(x.float() / scale_x).clamp(-127, 127).to(torch.int8)
    return (torch._int_mm(qx, qweight.mT).float() * (scale_x * scale)).to(x.dtype)


@cache
def compiled_int8() -> Callable[..., Tensor]:
    return torch.compile(eager_int8, dynamic=False)


def int8_contest(rows: int, columns: int, depth: int, compiled: bool) -> Contest:
    copies = copies_of(columns * depth)
    x = activations(rows, depth)
    weight = [weights(columns, depth) for _ in range(copies)]
    qweight, scale = map(
        list, zip(*(ops.quantize_int8(each, backend="reference") for each in weight), strict=True)
    )

    def ours(kernel: str) -> Make:
        return of(x, qweight, scale, call=lambda x, q, s: int8_linear_cuda(x, q, s, None, kernel))

    contenders = {OURS: ours("best"), "bf16 F.linear": of(x, weight, call=F.linear)}
    goals = {"bf16 F.linear": 1.7}
    if rows <= 16:
        contenders["few_tokens"] = ours("few_tokens")
    else:
        contenders["mma"] = ours("mma")
        contenders["torch._int_mm, eager"] = of(x, qweight, scale, call=eager_int8)
        goals = {"bf16 F.linear": 1.3, "torch._int_mm, eager": 3.0}
        if compiled:
            contenders["torch._int_mm, compiled"] = of(x, qweight, scale, call=compiled_int8())
            goals["torch._int_mm, compiled"] = 1.1
    triton = triton_or_none("int8_linear")
    if triton is not None:
        contenders["triton"] = of(x, qweight, scale, call=lambda x, q, s: triton(x, q, s, None))
    return Contest(
        "int8_linear",
        "bfloat16",
        {"M": rows, "N": columns, "K": depth},
        contenders,
        lambda copy: int8_linear_reference(x[copy % 2], qweight[copy], scale[copy], None),
        bit_equal,
        columns * depth + rows * depth * 2 + rows * columns * 2,
        2 * rows * columns * depth,
        goals,
        0.8 if rows <= 16 else None,
        copies,
        another=("bf16 F.linear", "torch._int_mm, eager", "torch._int_mm, compiled"),
    )


def masked_exactly(x: Tensor, weight: Tensor, kept: Tensor) -> Tensor:
    """The products in float32, for one mask or several."""
    if kept.dim() == 3:
        return torch.stack([masked_exactly(x, weight, each) for each in kept])
    return F.linear(x.float(), torch.where(kept, weight, 0).float())


def one_mask_at_a_time(x: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
    return torch.stack([masked_linear_cuda(x, weight, each, None) for each in mask])


def masked_contest(rows: int, masks: int, columns: int, depth: int) -> Contest:
    copies = copies_of(columns * depth * 2)
    x = activations(rows, depth)
    weight = [weights(columns, depth) for _ in range(copies)]
    shape = (columns, depth) if masks == 1 else (masks, columns, depth)
    kept = [torch.rand(shape, device="cuda") < 0.5 for _ in range(2)]
    mask = [ops.pack_mask(each, backend="reference") for each in kept]

    def ours(kernel: str) -> Make:
        return of(x, weight, mask, call=lambda x, w, m: masked_linear_cuda(x, w, m, None, kernel))

    contenders = {OURS: ours("best")}
    if masks > 1:
        contenders["one mask at a time"] = of(x, weight, mask, call=one_mask_at_a_time)
        goals = {"one mask at a time": 1 / 0.8}
    else:
        contenders["bf16 F.linear, dense"] = of(x, weight, call=F.linear)
        contenders["F.linear(x, w * mask)"] = of(x, weight, kept, call=lambda x, w, m: F.linear(x, w * m))
        goals = {"bf16 F.linear, dense": 1 / 1.1 if rows <= 16 else 1 / 1.2}
        if rows <= 16:
            goals["F.linear(x, w * mask)"] = 4.0
            contenders["few_tokens"] = ours("few_tokens")
        else:
            contenders["mma"] = ours("mma")
    triton = triton_or_none("masked_linear")
    if triton is not None:
        contenders["triton"] = of(x, weight, mask, call=lambda x, w, m: triton(x, w, m, None))
    return Contest(
        "masked_linear",
        "bfloat16",
        {"M": rows, "N": columns, "K": depth, "V": masks},
        contenders,
        lambda copy: masked_exactly(x[copy % 2], weight[copy], kept[copy % 2]),
        rounded,
        columns * depth * 2 + masks * columns * depth // 8 + rows * depth * 2 + masks * rows * columns * 2,
        2 * masks * rows * columns * depth,
        goals,
        None,
        copies,
        another=("bf16 F.linear, dense",),
    )


def bitmap_contest(rows: int, density: float, columns: int, depth: int) -> Contest:
    stored = int(columns * depth * (density * 2 + 1 / 8))
    copies = copies_of(stored)
    x = activations(rows, depth)
    dense = [
        weights(columns, depth) * (torch.rand(columns, depth, device="cuda") < density) for _ in range(copies)
    ]
    packed = [ops.BitmapWeight.pack(each) for each in dense]
    return Contest(
        "bitmap_linear",
        "bfloat16",
        {"M": rows, "N": columns, "K": depth, "density": density},
        {
            OURS: lambda copy: partial(bitmap_linear, x[copy % 2], packed[copy], backend="cuda"),
            "bf16 F.linear, dense": of(x, dense, call=F.linear),
        },
        lambda copy: F.linear(x[copy % 2].float(), dense[copy].float()),
        rounded,
        stored + rows * depth * 2 + rows * columns * 2,
        2 * rows * int(columns * depth * density),
        {"bf16 F.linear, dense": 1.4 if density == 0.5 else 2.4},
        None,
        copies,
    )


def shapes(quick: bool) -> tuple[tuple[int, int], ...]:
    """Of the 7B model, the largest and the smallest first."""
    return (SEVEN[1], SEVEN[3]) if quick else (SEVEN[1], SEVEN[3], SEVEN[0], SEVEN[2])


def int8_contests(quick: bool) -> Iterator[Case]:
    for shape in shapes(quick) + (() if quick else THIRTEEN):
        for rows in MANY + FEW:
            yield partial(int8_contest, rows, *shape, compiled=(rows, *shape) in COMPILED and not quick)


def masked_contests(quick: bool) -> Iterator[Case]:
    for shape in shapes(quick):
        for rows in FEW + MANY:
            yield partial(masked_contest, rows, 1, *shape)
        if shape == SEVEN[3]:
            for rows in (FEW[-1], MANY[-1]):
                yield partial(masked_contest, rows, SEVERAL, *shape)


def bitmap_contests(quick: bool) -> Iterator[Case]:
    for shape in shapes(quick):
        for density in DENSITIES:
            for rows in FEW:
                yield partial(bitmap_contest, rows, density, *shape)
