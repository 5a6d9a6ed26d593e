"""The CUDA kernel of bitmap_linear against its twin."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dtm_fast import ops

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("native_cuda")]


def whole(*shape: int, device: torch.device) -> Tensor:
    return torch.randint(-1, 2, shape, device=device).bfloat16()


@pytest.mark.parametrize("rows", [1, 2, 7, 8, 9, 15, 16, 17, 40])
@pytest.mark.parametrize(
    "shape", [(1, 1), (16, 128), (17, 129), (70, 300), (513, 77), (4096, 1024), (100, 4096), (33, 11008)]
)
def test_to_the_bit(cuda, shape, rows):
    for density in (0.0, 0.05, 0.25, 0.5, 0.9, 1.0):
        weight = whole(*shape, device=cuda) * (torch.rand(shape, device=cuda) < density)
        x, bias = whole(rows, shape[1], device=cuda), whole(shape[0], device=cuda)
        packed = ops.BitmapWeight.pack(weight)
        assert torch.equal(packed.to_dense(), weight)
        # For more tokens the weight is expanded, and torch may add up parts in bfloat16.
        expected = F.linear(x.double(), weight.double(), bias.double()).bfloat16()
        if rows > 16:
            expected = F.linear(x, weight, bias)
        assert torch.equal(ops.bitmap_linear(x, packed, bias, backend="cuda"), expected)


@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_it_is_as_exact_as_torch(cuda, density):
    weight = torch.randn(1000, 4096, device=cuda).bfloat16() * (torch.rand(1000, 4096, device=cuda) < density)
    x = torch.randn(13, 4096, device=cuda).bfloat16()
    exact = F.linear(x.double(), weight.double())
    torchs = float((F.linear(x, weight).double() - exact).norm())
    found = ops.bitmap_linear(x, ops.BitmapWeight.pack(weight), backend="cuda")
    assert float((found.double() - exact).norm()) <= 1.02 * torchs + 2.0**-22 * float(exact.norm())


def test_views_and_what_is_not_finite(cuda):
    weight = whole(40, 256, device=cuda)
    weight[:, 3] = 0
    wide = whole(16, 300, device=cuda)
    packed = ops.BitmapWeight.pack(weight)
    for x in (
        wide[:, 1:257],
        wide[::2, 5:261],
        wide[:4, :256].reshape(2, 2, 256),
        wide[:1, :256].expand(5, 256),
    ):
        expected = F.linear(x.double(), weight.double()).bfloat16()
        assert torch.equal(ops.bitmap_linear(x, packed, backend="cuda"), expected)
    x = wide[:, :256].clone()
    x[2, 7] = torch.nan
    y = ops.bitmap_linear(x, packed, backend="cuda")
    assert y[2].isnan().any()
    assert not y[[0, 1, 3]].isnan().any()


def test_nothing_to_do(cuda):
    for rows, columns, depth in ((0, 5, 8), (5, 0, 8), (5, 8, 0)):
        packed = ops.BitmapWeight.pack(whole(columns, depth, device=cuda))
        bias = whole(columns, device=cuda)
        y = ops.bitmap_linear(whole(rows, depth, device=cuda), packed, bias, backend="cuda")
        assert torch.equal(y, bias.expand(rows, columns))
