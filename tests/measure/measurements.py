"""Random configurations, what it means that two measurements are the same, and which tests need fused layers."""

import random
from collections.abc import Callable, Iterable

import pytest
import torch

from dtm_fast.compression import Configuration, Treatment
from dtm_fast.measure import EXTRA_METRICS, Measurement
from dtm_fast.model import InputStatistics
from dtm_fast.ops.layer_weights import Arithmetic, has_arithmetic

needs_kernels = pytest.mark.skipif(
    not has_arithmetic(Arithmetic.FLOAT32), reason="the instruction set in use has no kernel for fused layers"
)


class Ruin(Treatment):
    """Leaves nothing of a weight that is a number."""

    key = "ruin"

    def compress(self, weight: torch.Tensor, inputs: InputStatistics | None = None) -> torch.Tensor:
        return weight * torch.nan

    def bits(self, n: int, k: int) -> int:
        return 0


def some(
    paths: Iterable[str],
    draw_configuration: Callable[..., Configuration],
    count: int,
    most: int = 5,
    seed: int = 0,
) -> list[Configuration]:
    draw = random.Random(seed)
    return [draw_configuration(list(paths), draw, most) for _ in range(count)]


def assert_same(found: Measurement, expected: Measurement) -> None:
    """Every bit of what was measured."""
    assert torch.equal(found.fdt, expected.fdt)
    assert torch.equal(found.first_margin.view(torch.int32), expected.first_margin.view(torch.int32))
    for name in ("sdt", *EXTRA_METRICS):
        ours, other = getattr(found, name), getattr(expected, name)
        assert (ours is None) == (other is None)
        assert ours is None or torch.equal(ours, other), name
