"""Every operation on tensors of a GPU, where its twin runs, against the same on the CPU.

Values are small whole numbers where sums are compared to the bit: every order of summation is then exact.
"""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dtm_fast import nn, ops

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.bfloat16]


def whole(*shape: int, dtype: torch.dtype = torch.float32, most: int = 8) -> Tensor:
    return torch.randint(-most, most + 1, shape).to(dtype)


def mask_of(*shape: int) -> Tensor:
    return ops.pack_mask(torch.rand(shape) < 0.5)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("shape", [(507, 123), (3, 513), (1, 1), (0, 9), (9, 0), (2, 3, 33), (64, 1536)])
def test_quantize_int8(cuda, dtype, shape):
    weight = (torch.randn(shape) * torch.rand(*shape[:-1], 1) * 3).to(dtype)
    if weight.numel():
        weight.view(-1, shape[-1])[0] = 0
    expected, found = ops.quantize_int8(weight), ops.quantize_int8(weight.to(cuda))
    for ours, other in zip(found, expected, strict=True):
        assert ours.device.type == "cuda"
        assert torch.equal(ours.cpu(), other)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(7, 33, 65), (1, 1, 1), (129, 576, 200), (0, 4, 4), (5, 3, 0)])
def test_int8_linear(cuda, dtype, shape):
    rows, depth, columns = shape
    x, qweight = torch.randn(rows, depth).to(dtype), torch.randint(-128, 128, (columns, depth)).to(torch.int8)
    scale, bias = torch.rand(columns) + 0.01, torch.randn(columns).to(dtype)
    x[: rows // 2, : depth // 3] *= 100
    for given in (None, bias):
        expected = ops.int8_linear(x, qweight, scale, given)
        moved = (x.to(cuda), qweight.to(cuda), scale.to(cuda), None if given is None else given.to(cuda))
        assert torch.equal(ops.int8_linear(*moved).cpu(), expected)


def test_a_token_that_is_not_finite_gives_a_row_of_nan(cuda):
    x = torch.randn(4, 16)
    x[1, 3], x[2, 5] = torch.nan, torch.inf
    y = ops.int8_linear(x.to(cuda), whole(8, 16).to(torch.int8).to(cuda), torch.ones(8, device=cuda)).cpu()
    assert y.isnan().all(1).tolist() == [False, True, True, False]
    with pytest.raises(ValueError, match="weight: expected finite values, got 2 NaN or infinite of 64"):
        ops.quantize_int8(x.to(cuda))


@pytest.mark.parametrize("shape", [(507, 123), (3, 513), (0, 9), (9, 0), (17,), (2, 3, 33)])
def test_pack_mask(cuda, shape):
    mask = torch.rand(shape) < 0.5
    assert torch.equal(ops.pack_mask(mask.to(cuda)).cpu(), ops.pack_mask(mask))


@pytest.mark.parametrize("dtype", DTYPES)
def test_apply_mask(cuda, dtype):
    weight, mask = torch.randn(33, 77).to(dtype), mask_of(33, 77)
    weight[3, 5], weight[4, 6] = torch.nan, torch.inf
    found = ops.apply_mask(weight.to(cuda), mask.to(cuda)).cpu()
    assert torch.equal(found.nan_to_num(7.0), ops.apply_mask(weight, mask).nan_to_num(7.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(33, 77), (3, 33, 77)])
def test_masked_linear(cuda, dtype, shape):
    most = 8 if dtype == torch.float32 else 1  # bfloat16 holds whole numbers up to 256
    x, weight, bias = (whole(*each, dtype=dtype, most=most) for each in ((5, 4, 77), (33, 77), (33,)))
    mask = mask_of(*shape)
    found = ops.masked_linear(x.to(cuda), weight.to(cuda), mask.to(cuda), bias.to(cuda))
    assert torch.equal(found.cpu(), ops.masked_linear(x, weight, mask, bias, backend="reference"))


def test_masked_linear_of_nested_masks(cuda):
    x, weight = whole(6, 40), whole(9, 40)
    order = torch.rand(9, 40)
    masks = torch.stack([ops.pack_mask(order < share) for share in (0.9, 0.5, 0.1)])
    found = ops.masked_linear(x.to(cuda), weight.to(cuda), masks.to(cuda), nested=True)
    assert torch.equal(found.cpu(), ops.masked_linear(x, weight, masks, nested=True))


def test_the_gradients_of_masked_linear(cuda):
    mask, given = mask_of(9, 40), whole(6, 9)
    gradients = []
    for device in ("cpu", cuda):
        torch.manual_seed(1)
        x, weight = whole(6, 40).to(device).requires_grad_(), whole(9, 40).to(device).requires_grad_()
        y = ops.masked_linear(x, weight, mask.to(device))
        gradients.append([each.cpu() for each in torch.autograd.grad(y, (x, weight), given.to(device))])
    for ours, other in zip(*gradients, strict=True):
        assert torch.equal(ours, other)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sparse_weights(cuda, dtype):
    weight = (whole(70, 300, most=1) * (torch.rand(70, 300) < 0.2)).to(dtype)
    x, bias = whole(11, 300, dtype=dtype, most=1), whole(70, dtype=dtype, most=1)
    packed, other = ops.SparseWeight.pack(weight.to(cuda)), ops.SparseWeight.pack(weight)
    for name in ("values", "columns", "rows", "steps"):
        assert torch.equal(getattr(packed, name).cpu(), getattr(other, name)), name
    found = ops.sparse_linear(x.to(cuda), packed, bias.to(cuda))
    assert torch.equal(found.cpu(), ops.sparse_linear(x, other, bias, backend="reference"))


def ties(vocabulary: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, a head and references where many logits are equal."""
    hidden, head = whole(3, 50, 16, dtype=dtype, most=2), whole(vocabulary, 16, dtype=dtype, most=2)
    return hidden, head, F.linear(hidden.double(), head.double()).to(dtype).argmax(-1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [1, 7, 1000, 5003])
def test_token_divergence(cuda, dtype, vocabulary):
    hidden, head, reference = ties(vocabulary, dtype)
    reference[:, ::3] = torch.randint(0, vocabulary, reference[:, ::3].shape)
    expected = ops.token_divergence(hidden, head, reference)
    found = ops.token_divergence(hidden.to(cuda), head.to(cuda), reference.to(cuda))
    for name in ("mismatch", "first", "count"):
        assert torch.equal(getattr(found, name).cpu(), getattr(expected, name)), name
    assert torch.allclose(found.nll.cpu(), expected.nll, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("change", [0.0, 0.02, 0.3, 1.0])
def test_certified_token_divergence(cuda, dtype, change):
    hidden, head, reference = ties(5003, dtype)
    certificate = ops.Certificate.build(hidden.to(cuda), head.to(cuda), k=(4, 64))
    moved = hidden + (whole(*hidden.shape, most=1) * (torch.rand(hidden.shape) < change)).to(dtype)
    expected = ops.token_divergence(moved, head, reference)
    found = ops.token_divergence(
        moved.to(cuda), certificate.lm_head, reference.to(cuda), certificate=certificate
    )
    for name in ("mismatch", "first", "count"):
        assert torch.equal(getattr(found, name).cpu(), getattr(expected, name)), name
    assert sum(found.settled.values()) == reference.numel()


def test_a_layer_moves_to_the_gpu(cuda):
    linear = torch.nn.Linear(40, 24)
    with torch.no_grad():
        linear.weight.copy_(whole(24, 40))
        linear.bias.copy_(whole(24))
    x, mask = whole(5, 40), mask_of(24, 40)
    makers: dict[str, Callable[[], torch.nn.Module]] = {
        "int8": lambda: nn.Int8Linear.from_linear(linear),
        "masked": lambda: nn.MaskedLinear.from_linear(copy.deepcopy(linear), mask),  # it shares the weight
        "sparse": lambda: nn.SparseLinear.from_linear(linear, mask),
    }
    with torch.no_grad():
        for name, make in makers.items():
            layer = make()
            expected = layer(x)
            assert torch.equal(layer.to(cuda)(x.to(cuda)).cpu(), expected), name


def test_a_sparse_layer_in_bfloat16_is_packed_for_the_gpu(cuda):
    linear = torch.nn.Linear(200, 70, bias=False).bfloat16()
    with torch.no_grad():
        linear.weight.copy_(whole(70, 200, most=1) * (torch.rand(70, 200) < 0.3))
    x = whole(5, 200, dtype=torch.bfloat16, most=1)
    layer = nn.SparseLinear.from_linear(linear)
    with torch.no_grad():
        expected = layer(x)
        layer.to(cuda)
        assert torch.equal(layer(x.to(cuda)).cpu(), expected)
        layer.values *= 2  # whole numbers still
        assert torch.equal(layer(x.to(cuda)).cpu(), 2 * expected)
        layer.values /= 3  # and no bfloat16 any more: the twin
        assert layer._bitmap() is None
        assert torch.allclose(layer(x.to(cuda)).cpu(), 2 / 3 * expected, rtol=2**-7, atol=1e-5)


def test_tensors_of_two_devices_are_refused(cuda):
    x, weight, mask = whole(5, 40), whole(9, 40), mask_of(9, 40)
    with pytest.raises(ValueError, match="weight: expected device cuda:0, that of x, got cpu"):
        ops.masked_linear(x.to(cuda), weight, mask.to(cuda))
    with pytest.raises(RuntimeError, match="backend 'cpu' cannot run: the tensors are on cuda"):
        ops.masked_linear(x.to(cuda), weight.to(cuda), mask.to(cuda), backend="cpu")
