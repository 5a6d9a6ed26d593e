"""Inside torch.autocast an operation gives the bits that it gives outside, whatever runs it."""

from collections.abc import Callable

import pytest
import torch

from dtm_fast import nn, ops

DRAW = torch.Generator().manual_seed(0)
X, WEIGHT = torch.randn(5, 40, generator=DRAW), torch.randn(12, 40, generator=DRAW)
MASK = ops.pack_mask(torch.rand(12, 40, generator=DRAW) < 0.5)
LADDER = torch.stack([torch.full_like(MASK, 255), MASK])
SPARSE = ops.SparseWeight.pack(WEIGHT, MASK)
QWEIGHT, SCALE = ops.quantize_int8(WEIGHT)
HIDDEN, TOKENS = X[None], torch.randint(12, (1, 5), generator=DRAW)

CALLS: dict[str, Callable[[str | None], object]] = {
    "quantize_int8": lambda backend: ops.quantize_int8(X, backend=backend),
    "int8_linear": lambda backend: ops.int8_linear(X, QWEIGHT, SCALE, backend=backend),
    "apply_mask": lambda backend: ops.apply_mask(WEIGHT, MASK, backend=backend),
    "masked_linear": lambda backend: ops.masked_linear(X, WEIGHT, MASK, backend=backend),
    "masks": lambda backend: ops.masked_linear(X, WEIGHT, LADDER, backend=backend),
    "ladder": lambda backend: ops.masked_linear(X, WEIGHT, LADDER, nested=True, backend=backend),
    "sparse_linear": lambda backend: ops.sparse_linear(X, SPARSE, backend=backend),
    "token_divergence": lambda backend: ops.token_divergence(HIDDEN, WEIGHT, TOKENS, backend=backend),
}


def tensors_of(found: object) -> list[torch.Tensor]:
    """Of one, of several, or of a result with names."""
    if isinstance(found, torch.Tensor):
        return [found]
    values = found if isinstance(found, tuple) else vars(found).values()
    return [each for each in values if each is not None]


@torch.no_grad()
@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("operation", CALLS)
def test_it_computes_as_outside(operation: str, backend: str | None) -> None:
    expected = tensors_of(CALLS[operation](backend))
    with torch.autocast("cpu", torch.bfloat16):
        found = tensors_of(CALLS[operation](backend))
    for ours, outside in zip(found, expected, strict=True):
        assert ours.dtype == outside.dtype
        assert torch.equal(ours, outside)


@torch.no_grad()
def test_a_certificate_made_and_used_there_proves_the_same() -> None:
    near = HIDDEN + 1e-3
    expected = ops.token_divergence(near, WEIGHT, TOKENS)
    with torch.autocast("cpu", torch.bfloat16):
        certificate = ops.Certificate.build(HIDDEN, WEIGHT)
        found = ops.token_divergence(near, WEIGHT, TOKENS, certificate=certificate)
    assert torch.equal(found.mismatch, expected.mismatch)
    outside = ops.Certificate.build(HIDDEN, WEIGHT)
    for name, kept in vars(outside).items():
        if isinstance(kept, torch.Tensor):
            assert torch.equal(getattr(certificate, name), kept), name


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
@pytest.mark.parametrize("layer", [nn.Int8Linear, nn.MaskedLinear, nn.SparseLinear])
def test_a_layer_casts_there_what_torchs_own_does_and_refuses_the_rest(layer, dtype) -> None:
    linear = torch.nn.Linear(40, 12)
    x = torch.ones(5, 40, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.from_linear(linear)(X).dtype == linear(X).dtype == torch.bfloat16
        with pytest.raises(RuntimeError, match="same dtype"):
            linear(x)
        with pytest.raises(TypeError, match=r"^x: expected dtype torch.float32 or torch.bfloat16, got"):
            layer.from_linear(linear)(x)
