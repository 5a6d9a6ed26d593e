"""python -m benchmarks.break_even: from which density on our float layers are faster than torch.nn.Linear.

Where the table in dtm_fast/compression/break_even.py comes from. It times the products of a decoder layer of
SmolLM2-135M, those of its two small matrices apart: for one token, with other weights each time as when a model writes,
and for a prompt of 256 tokens. To see what a lesser machine would do, force all
of DTM_FAST_CPU_ISA, ONEDNN_MAX_CPU_ISA, MKL_ENABLE_INSTRUCTIONS and ATEN_CPU_CAPABILITY.
"""

import argparse
import math
from collections.abc import Callable, Sequence

import torch

from benchmarks.disturbance import Disturbance
from benchmarks.interleave import Contender, measure
from dtm_fast import nn
from dtm_fast.compression.break_even import PROMPT, WRITTEN
from dtm_fast.ops import native

# (K, N)
SHAPES = {
    "q, o, gate, up, down": [(576, 576), (576, 576), (576, 1536), (576, 1536), (1536, 576)],
    "k, v": [(576, 192), (576, 192)],
}
DENSITIES = (0.75, 0.5, 0.25, 0.1)
DENSE, MASKED = "dense", "MaskedLinear"
_WEIGHT_BYTES = 400 * 2**20  # of all 30 layers in float32
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def contenders(shapes: Sequence[tuple[int, int]], rows: int, dtype: torch.dtype) -> list[Contender]:
    """The same products by torch.nn.Linear, by SparseLinear at each density and by a MaskedLinear that keeps all."""
    size = sum(k * n for k, n in shapes) * dtype.itemsize
    copies = max(2, math.ceil(_WEIGHT_BYTES / size * dtype.itemsize / 4)) if rows == 1 else 2
    inputs = [torch.randn(1, rows, k).to(dtype) for k, _ in shapes]
    dense = [[torch.nn.Linear(k, n, bias=False, dtype=dtype) for k, n in shapes] for _ in range(copies)]

    def contender(name: str, layer_of: Callable[[torch.nn.Linear], torch.nn.Module]) -> Contender:
        def call(layers: list[torch.nn.Module]) -> Callable[[], list[torch.Tensor]]:
            return lambda: [layer(x) for layer, x in zip(layers, inputs, strict=True)]

        return Contender(name, tuple(call([layer_of(each) for each in some]) for some in dense))

    def sparse(density: float) -> Callable[[torch.nn.Linear], torch.nn.Module]:
        return lambda each: nn.SparseLinear.from_linear(each, torch.rand(each.weight.shape) < density)

    found = [contender(DENSE, lambda each: each), contender(MASKED, nn.MaskedLinear.from_linear)]
    for result, expected in zip(found[1].calls[0](), found[0].calls[0](), strict=True):
        error = float((result.double() - expected.double()).norm() / expected.double().norm())
        assert error <= _TOLERANCE[dtype], f"{MASKED}: relative error {error:.2g}"
    return found + [contender(f"{density:g}", sparse(density)) for density in DENSITIES]


def break_even(relative: dict[float, float]) -> float:
    """The density where the straight line through (density, time relative to the dense one) reaches 1."""
    mean_d, mean_t = sum(relative) / len(relative), sum(relative.values()) / len(relative)
    slope = sum((d - mean_d) * (t - mean_t) for d, t in relative.items()) / sum(
        (d - mean_d) ** 2 for d in relative
    )
    return mean_d + (1 - mean_t) / slope


@torch.no_grad()
def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.break_even", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(given)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print("isa dtype weights: break-even density of a token, a prompt, both; time of MaskedLinear for each")
    for dtype in (torch.float32, torch.bfloat16):
        for name, shapes in SHAPES.items():
            seconds: dict[str, list[float]] = {}
            dense: list[float] = []
            for rows in (1, PROMPT):
                timings = measure(
                    contenders(shapes, rows, dtype), options.rounds, 0.01, disturbance=Disturbance()
                ).timings
                dense.append(timings[DENSE].median)
                for each, timing in timings.items():
                    relative = timing.times_as_long_as(timings[DENSE])
                    seconds.setdefault(each, []).append(relative)
            shares = [WRITTEN * dense[0], dense[1]]
            for relatives in seconds.values():
                both = sum(r * s for r, s in zip(relatives, shares, strict=True)) / sum(shares)
                relatives.append(both)
            even = [break_even({d: seconds[f"{d:g}"][i] for d in DENSITIES}) for i in range(3)]
            print(
                native.cpu_isa(),
                str(dtype).removeprefix("torch."),
                f"{name}:",
                ", ".join(f"{each:.2f}" for each in even) + ";",
                ", ".join(f"{each:.2f}" for each in seconds[MASKED]),
                f"(dense: {dense[0] * 1e6:.0f} µs, {dense[1] * 1e6:.0f} µs)",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
