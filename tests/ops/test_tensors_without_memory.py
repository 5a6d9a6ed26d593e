"""Arguments whose elements lie nowhere, or elsewhere: refused or computed by their own rules, never read as 0."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.testing._internal.two_tensor import TwoTensor

from dtm_fast import nn, ops
from dtm_fast.ops.sparse_linear import packed_sparse_linear

X, WEIGHT, BIAS = torch.randn(4, 64), torch.randn(32, 64), torch.randn(32)
MASK = ops.pack_mask(torch.rand(32, 64) < 0.5)
LADDER = torch.stack([torch.full_like(MASK, 255), MASK])
QWEIGHT, SCALE = ops.quantize_int8(WEIGHT)
SPARSE = ops.SparseWeight.pack(WEIGHT, MASK)
KEPT = {"values": SPARSE.values, "columns": SPARSE.columns, "rows": SPARSE.rows, "steps": SPARSE.steps}
SIZES = {"N": 32, "K": 64}

CALLS: dict[str, tuple[Callable[..., Tensor], dict[str, Tensor], dict[str, object]]] = {
    "int8_linear": (
        ops.int8_linear,
        {"x": X, "qweight": QWEIGHT, "scale": SCALE, "bias": BIAS},
        {},
    ),
    "masked_linear": (ops.masked_linear, {"x": X, "weight": WEIGHT, "mask": MASK, "bias": BIAS}, {}),
    "ladder": (
        ops.masked_linear,
        {"x": X, "weight": WEIGHT, "mask": LADDER, "bias": BIAS},
        {"nested": True},
    ),
    "sparse_linear": (packed_sparse_linear, {"x": X, **KEPT, "bias": BIAS}, SIZES),
}
ARGUMENTS = [(operation, name) for operation, (_, given, _) in CALLS.items() for name in given]


def freed(value: Tensor) -> Tensor:
    """As FSDP frees what another device holds."""
    value = value.clone()
    value.untyped_storage().resize_(0)
    return value


@pytest.mark.parametrize("without", [freed, torch._to_functional_tensor], ids=["freed", "functional"])
@pytest.mark.parametrize(("operation", "name"), ARGUMENTS)
def test_what_has_no_memory_is_refused(
    operation: str, name: str, without: Callable[[Tensor], Tensor]
) -> None:
    function, given, options = CALLS[operation]
    with pytest.raises(
        TypeError, match=rf"^{name}: expected a tensor with data, got one whose storage has none$"
    ):
        function(**(given | {name: without(given[name])}), **options)


@pytest.mark.parametrize(("operation", "name"), ARGUMENTS)
def test_a_subclass_computes_by_its_own_rules(operation: str, name: str) -> None:
    function, given, options = CALLS[operation]
    expected = function(**given, **options)
    value = given[name]
    found = function(**(given | {name: TwoTensor(value, value.clone())}), **options)
    assert isinstance(found, TwoTensor)
    assert torch.equal(found.a, expected)
    assert torch.equal(found.b, expected)


@pytest.mark.parametrize("asked", ["is_neg", "requires_grad"])
@pytest.mark.parametrize("operation", CALLS)
def test_what_is_raised_while_an_argument_is_looked_at_arrives(operation: str, asked: str) -> None:
    class Interrupted(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            name = getattr(getattr(function, "__self__", function), "__name__", "")
            if name == asked:
                raise KeyboardInterrupt
            return function(*args, **(kwargs or {}))

    function, given, options = CALLS[operation]
    with pytest.raises(KeyboardInterrupt), Interrupted():
        function(**given, **options)


@pytest.mark.parametrize("size", [64, 2048])
def test_a_layer_of_a_fake_one_is_fake(size: int) -> None:
    with FakeTensorMode():
        layer = nn.Int8Linear.from_linear(torch.nn.Linear(size, size))
        assert layer(torch.randn(3, size)).shape == (3, size)
