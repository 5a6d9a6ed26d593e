"""The operators under torch.library's checks, torch.compile and inference mode."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dtm_fast import ops


def arguments() -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    x, weight = torch.randn(2, 5, 37), torch.randn(11, 37)
    qweight, scale = ops.quantize_int8(weight)
    kept = torch.rand(3, 11, 37) < 0.5
    packed = ops.pack_mask(kept)
    reference = torch.randint(0, 11, (2, 5))
    return {
        "quantize_int8": (ops.quantize_int8, (weight,)),
        "int8_linear": (ops.int8_linear, (x.bfloat16(), qweight, scale, torch.randn(11))),
        "pack_mask": (ops.pack_mask, (kept,)),
        "unpack_mask": (ops.unpack_mask, (packed, 37)),
        "apply_mask": (ops.apply_mask, (weight, packed[0])),
        "masked_linear": (ops.masked_linear, (x, weight, packed, torch.randn(11))),
        "sparse_linear": (ops.sparse_linear, (x, ops.SparseWeight.pack(weight), torch.randn(11))),
        "bitmap_linear": (
            ops.bitmap_linear,
            (x.bfloat16(), ops.BitmapWeight.pack(weight.bfloat16(), packed[0]), torch.randn(11).bfloat16()),
        ),
        "token_divergence": (ops.token_divergence, (x, weight, reference)),
    }


OPERATIONS = list(arguments())


def flat(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments as the operator takes them: a packed weight as its tensors and sizes."""
    packed = ops.SparseWeight, ops.BitmapWeight
    parts = (vars(each).values() if isinstance(each, packed) else (each,) for each in values)
    return tuple(part for each in parts for part in each)


def assert_same(first: Any, second: Any) -> None:
    first, second = ((each,) if isinstance(each, torch.Tensor) else each for each in (first, second))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_opcheck(operation: str) -> None:
    _, values = arguments()[operation]
    torch.library.opcheck(getattr(torch.ops.dtm_fast, operation).default, flat(values))


@pytest.mark.once
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_compiles_without_graph_breaks(operation: str, dynamic: bool) -> None:
    torch.compiler.reset()
    function, values = arguments()[operation]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    assert_same(compiled(*values), function(*values))


@pytest.mark.once
@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*:DeprecationWarning")
def test_what_torch_traces_computes_with_other_values_too() -> None:
    x, weight = torch.randn(5, 37), torch.randn(11, 37)
    mask, (qweight, scale) = ops.pack_mask(weight > 0), ops.quantize_int8(weight)
    packed, reference = ops.SparseWeight.pack(weight), torch.arange(5)
    functions: list[Callable[[torch.Tensor], Any]] = [
        ops.quantize_int8,
        lambda x: ops.int8_linear(x, qweight, scale),
        lambda x: ops.masked_linear(x, weight, mask),
        lambda x: ops.sparse_linear(x, packed),
        lambda x: ops.apply_mask(x, ops.pack_mask(x > 0)),
        lambda x: ops.unpack_mask(ops.pack_mask(x > 0), 37),
        lambda x: ops.token_divergence(x[None], weight, reference[None])[1],
    ]
    for function in functions:
        traced = torch.jit.trace(function, (x,))
        other = torch.randn(5, 37)
        assert_same(traced(other), function(other))


def test_a_negated_view_is_refused() -> None:
    """Its memory holds the negative values of what torch reads."""
    x, weight = torch._neg_view(torch.randn(5, 37)), torch.randn(11, 37)
    calls: list[Callable[[], Any]] = [
        lambda: ops.quantize_int8(x),
        lambda: ops.int8_linear(x, *ops.quantize_int8(weight)),
        lambda: ops.masked_linear(x, weight, ops.pack_mask(weight > 0)),
        lambda: ops.sparse_linear(x, ops.SparseWeight.pack(weight)),
        lambda: ops.SparseWeight.pack(x),
        lambda: ops.apply_mask(x, ops.pack_mask(x > 0)),
        lambda: ops.token_divergence(x[None], weight, torch.zeros(1, 5, dtype=torch.int64)),
    ]
    for call in calls:
        with pytest.raises(
            TypeError, match=r"expected values as they lie in memory, .* call .resolve_neg\(\)"
        ):
            call()
    assert_same(ops.quantize_int8(x.resolve_neg()), ops.quantize_int8(x.clone()))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_runs_in_inference_mode_and_through_the_dispatcher(operation: str) -> None:
    function, values = arguments()[operation]
    expected = function(*values)
    with torch.inference_mode():
        assert_same(function(*values), expected)
    assert_same(getattr(torch.ops.dtm_fast, operation)(*flat(values)), expected)


@pytest.mark.once
def test_value_errors_survive_compilation() -> None:
    torch.compiler.reset()
    compiled = torch.compile(ops.quantize_int8, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match="weight: expected finite values, got 1 NaN or infinite of 4"):
        compiled(torch.tensor([[1.0, torch.nan, 2.0, 3.0]]))


@pytest.mark.once
@pytest.mark.parametrize("backend", [None, "reference"])
def test_a_compiled_operation_does_not_lose_a_gradient_silently(backend: str | None) -> None:
    torch.compiler.reset()
    hidden, lm_head = torch.randn(2, 4, 16, requires_grad=True), torch.randn(3, 16)
    reference = torch.zeros(2, 4, dtype=torch.int64)
    compiled = torch.compile(ops.token_divergence, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="token_divergence has no backward"):
        compiled(hidden, lm_head, reference, backend=backend)
