"""10,000 calls of every operation leave the process as large as it was."""

import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from decoder_layer_twin import packed, random_parts

from dtm_fast import ops
from dtm_fast.ops.decoder_layer import decoder_layer
from dtm_fast.ops.layer_weights import Arithmetic, LayerShape, has_arithmetic

pytestmark = pytest.mark.once

CALLS = 10_000
WARMING_CALLS = 1_000
# The smallest thing that a call could lose, a tensor of no elements, takes more than 200 bytes: 2 MB in all. What
# malloc and Python's own arenas take or give back meanwhile is a few pages.
ALLOWED_BYTES = 512 * 1024

Call = Callable[[], object]


def quantize_int8() -> Call:
    weight = torch.randn(5, 33)
    return lambda: ops.quantize_int8(weight)


def int8_linear() -> Call:
    x, (qweight, scale), bias = torch.randn(9, 33), ops.quantize_int8(torch.randn(70, 33)), torch.randn(70)
    return lambda: ops.int8_linear(x, qweight, scale, bias)


def pack_mask() -> Call:
    mask = torch.rand(40, 33) < 0.5
    return lambda: ops.pack_mask(mask)


def unpack_mask() -> Call:
    packed = ops.pack_mask(torch.rand(40, 33) < 0.5)
    return lambda: ops.unpack_mask(packed, 33)


def apply_mask() -> Call:
    weight, mask = torch.randn(40, 33), ops.pack_mask(torch.rand(40, 33) < 0.5)
    return lambda: ops.apply_mask(weight, mask)


def masked_linear() -> Call:
    x, weight, mask = torch.randn(9, 33), torch.randn(70, 33), ops.pack_mask(torch.rand(2, 70, 33) < 0.5)
    return lambda: ops.masked_linear(x, weight, mask)


def pack_sparse() -> Call:
    weight, mask = torch.randn(70, 33), ops.pack_mask(torch.rand(70, 33) < 0.5)
    return lambda: ops.SparseWeight.pack(weight, mask)


def sparse_linear() -> Call:
    x, weight = torch.randn(9, 33), ops.SparseWeight.pack(torch.randn(70, 33))
    return lambda: ops.sparse_linear(x, weight)


def masked_ladder() -> Call:
    x, weight, mask = torch.randn(9, 33), torch.randn(70, 33), ops.pack_mask(torch.rand(70, 33) < 0.5)
    return lambda: ops.masked_linear(x, weight, mask.expand(2, 70, 5), nested=True)


def token_divergence() -> Call:
    hidden, head, reference = torch.randn(2, 3, 16), torch.randn(300, 16), torch.randint(0, 300, (2, 3))
    return lambda: ops.token_divergence(hidden, head, reference)


def certified_token_divergence() -> Call:
    hidden, head, reference = torch.randn(1, 3, 16), torch.randn(300, 16), torch.randint(0, 300, (1, 3))
    certificate = ops.Certificate.build(hidden, head)
    return lambda: ops.token_divergence(hidden + 0.1, head, reference, certificate=certificate)


def fused_layer() -> Call:
    if not has_arithmetic(Arithmetic.FLOAT32):
        pytest.skip("the instruction set in use has no kernel for fused layers")
    shape = LayerShape(20, 2, 1, 6, 32, eps=1e-5, attention_scale=0.5)
    parts = random_parts(shape, positions=9, fused=False, bias=True, norms=True)
    layer, x, kv = packed(parts, Arithmetic.FLOAT32), torch.randn(2, 9, 20), torch.empty(2, 9, 12)
    return lambda: decoder_layer(layer, x, torch.empty_like(x), kv)


def refused() -> Call:
    """An error on the way must not keep anything either."""
    x, qweight = torch.randn(9, 33), torch.zeros(70, 32, dtype=torch.int8)

    def call() -> None:
        with pytest.raises(ValueError, match="qweight"):
            ops.int8_linear(x, qweight, torch.ones(70))

    return call


def resident_bytes() -> int:
    """The memory that the process has in use, as proc(5) says it in /proc/self/statm."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.parametrize(
    "prepare",
    [
        quantize_int8,
        int8_linear,
        pack_mask,
        unpack_mask,
        apply_mask,
        masked_linear,
        pack_sparse,
        sparse_linear,
        masked_ladder,
        token_divergence,
        certified_token_divergence,
        fused_layer,
        refused,
    ],
    ids=lambda prepare: prepare.__name__,
)
def test_ten_thousand_calls_do_not_grow_the_process(prepare: Callable[[], Call]) -> None:
    call = prepare()
    for _ in range(WARMING_CALLS):
        call()
    before = resident_bytes()
    for _ in range(CALLS):
        call()
    grown = resident_bytes() - before
    assert grown <= ALLOWED_BYTES, f"{grown / 1024:.0f} KiB more after {CALLS} calls"
