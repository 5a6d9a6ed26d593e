"""Operations under what a program may have set around them, and on tensors that have no data."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from dtm_fast import nn, ops
from dtm_fast.ops import native
from dtm_fast.ops.decoder_layer import new_states
from dtm_fast.ops.layer_weights import Arithmetic, LayerShape, PackedMatrix, has_arithmetic
from tests.ops.test_registration import OPERATIONS, arguments, assert_same


@pytest.fixture
def restored_defaults() -> Iterator[None]:
    dtype = torch.get_default_dtype()
    yield
    torch.set_default_dtype(dtype)
    torch.set_default_device(None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_what_decoder_layers_are_packed_into_is_float32(dtype, restored_defaults):
    if not has_arithmetic(Arithmetic.FLOAT32):
        pytest.skip("the instruction set in use has no kernel for layers")
    weight, shape = torch.randn(96, 64), LayerShape(64, 4, 2, 16, 96, 1e-6, 0.25)
    expected = PackedMatrix.pack(weight, Arithmetic.FLOAT32).panels
    torch.set_default_dtype(dtype)
    with torch.device("meta"):
        found, states = PackedMatrix.pack(weight, Arithmetic.FLOAT32).panels, new_states(shape, 2, 3)
    assert torch.equal(found, expected)
    assert {each.dtype for each in states.tensors() if each is not None} == {torch.float32}


def masked(x: torch.Tensor) -> torch.Tensor:
    weight = torch.linspace(-1, 1, 8 * 16).reshape(8, 16)
    return ops.masked_linear(x, weight, ops.pack_mask(weight.abs() > 0.5))


X = torch.linspace(-2, 3, 48).reshape(3, 16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_default_dtype_of_the_program_changes_nothing(operation, dtype, restored_defaults):
    function, values = arguments()[operation]
    expected = function(*values)
    torch.set_default_dtype(dtype)
    assert_same(function(*values), expected)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_default_device_of_the_program_changes_nothing(operation, restored_defaults):
    function, values = arguments()[operation]
    expected = function(*values)
    torch.set_default_device("meta")
    assert_same(function(*values), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_packing_a_sparse_weight_under_another_default_dtype(dtype, restored_defaults):
    weight = torch.randn(300, 400) * (torch.rand(300, 400) < 0.5)
    expected = ops.SparseWeight.pack(weight)
    torch.set_default_dtype(dtype)
    found = ops.SparseWeight.pack(weight)
    assert_same(tuple(vars(found).values())[:4], tuple(vars(expected).values())[:4])


def test_packing_a_sparse_weight_under_another_default_device():
    weight = torch.randn(300, 400)
    expected = ops.SparseWeight.pack(weight)
    with torch.device("meta"):
        found = ops.SparseWeight.pack(weight)
    assert_same(tuple(vars(found).values())[:4], tuple(vars(expected).values())[:4])


# A packed weight is checked where it is made, from its values.
@pytest.mark.parametrize("operation", sorted(set(OPERATIONS) - {"sparse_linear", "bitmap_linear"}))
def test_fake_tensors_give_shapes_and_dtypes(operation):
    function, values = arguments()[operation]
    expected = function(*values)
    with FakeTensorMode() as mode:
        found = function(*(mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for v in values))
    expected, found = ((each,) if isinstance(each, torch.Tensor) else each for each in (expected, found))
    assert [(each.shape, each.dtype) for each in found] == [(each.shape, each.dtype) for each in expected]


def test_fake_rows_through_a_sparse_weight():
    packed = ops.SparseWeight.pack(torch.randn(8, 16))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert ops.sparse_linear(mode.from_tensor(X), packed).shape == (3, 8)


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_packing_a_fake_weight_is_refused():
    if native.why_no_cpu_kernels() is not None:
        pytest.skip("torch's own operations pack, and complain as they do")
    with FakeTensorMode() as mode:
        weight, mask = (
            mode.from_tensor(torch.randn(8, 16)),
            mode.from_tensor(torch.ones(8, 2, dtype=torch.uint8)),
        )
        with pytest.raises(
            TypeError, match=r"^expected tensors with data, got a FakeTensor on cpu that has none$"
        ):
            ops.SparseWeight.pack(weight, mask)


def test_a_trace_of_the_graph_computes_instead_of_keeping_what_memory_held():
    graph = make_fx(masked)(X)
    assert torch.equal(graph(2 * X), masked(2 * X))


def test_vmap_and_functionalize():
    batches = torch.stack([X, -X])
    assert torch.equal(torch.func.vmap(masked)(batches), torch.stack([masked(X), masked(-X)]))
    assert torch.equal(torch.func.functionalize(masked)(X), masked(X))


def test_gradients_by_torch_func():
    expected = torch.autograd.functional.jacobian(lambda x: masked(x).sum(), X)
    torch.testing.assert_close(torch.func.grad(lambda x: masked(x).sum())(X), expected)


FORWARD: dict[str, Callable[[torch.Tensor], Any]] = {
    "masked_linear": masked,
    "int8_linear": lambda x: ops.int8_linear(x, *ops.quantize_int8(torch.ones(8, 16))),
    "sparse_linear": lambda x: ops.sparse_linear(x, ops.SparseWeight.pack(torch.ones(8, 16))),
    "apply_mask": lambda x: ops.apply_mask(x, ops.pack_mask(torch.ones(3, 16, dtype=torch.bool))),
}


@pytest.mark.parametrize("operation", FORWARD)
def test_a_forward_mode_derivative_is_refused_and_not_lost(operation):
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(X, torch.ones_like(X))
        with pytest.raises(RuntimeError, match=rf"^{operation} has no forward-mode derivative$"):
            FORWARD[operation](dual)


@pytest.mark.parametrize("layer", [nn.Int8Linear, nn.MaskedLinear, nn.SparseLinear])
def test_layers_tell_shapes_on_the_meta_device(layer):
    assert layer(16, 8, device="meta")(X.to("meta")).shape == (3, 8)


def test_scales_carry_no_gradient_whatever_runs_the_operator():
    weight = torch.randn(8, 16, requires_grad=True)
    _, scale = torch.compile(ops.quantize_int8, backend="eager")(weight)
    assert not scale.requires_grad
