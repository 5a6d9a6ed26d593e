"""Calls of CPU kernels straight with tensors: the bits of the other way, and nothing but what is plain."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dtm_fast import ops
from dtm_fast.ops import direct, native
from dtm_fast.ops.sparse_linear import packed_sparse_linear

M, K, N = 3, 40, 24


@pytest.fixture(autouse=True)
def only_where_there_is_a_way() -> None:
    if native.cpu_isa() == "reference":
        pytest.skip("no native kernel runs")
    if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        pytest.skip("this torch has no table of functions that shows C++ its tensors")


def int8_arguments(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    qweight = torch.randint(-128, 128, (N, K), dtype=torch.int8)
    return {
        "x": torch.randn(M, K).to(dtype),
        "qweight": qweight,
        "scale": torch.rand(N),
        "bias": torch.randn(N),
    }


def masked_arguments(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    weight, bias = torch.randn(N, K).to(dtype), torch.randn(N).to(dtype)
    mask = ops.pack_mask(torch.rand(N, K) < 0.5)
    return {"x": torch.randn(M, K).to(dtype), "weight": weight, "mask": mask, "bias": bias}


def sparse_arguments(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    packed = ops.SparseWeight.pack(torch.randn(N, K), ops.pack_mask(torch.rand(N, K) < 0.5))
    tensors = {name: getattr(packed, name) for name in ("values", "columns", "rows", "steps", "N", "K")}
    return {"x": torch.randn(M, K).to(dtype), **tensors, "bias": torch.randn(N).to(dtype)}


ARGUMENTS = {
    "int8_linear": int8_arguments,
    "masked_linear": masked_arguments,
    "sparse_linear": sparse_arguments,
}
operations = pytest.mark.parametrize("operation", ARGUMENTS)


def looked_at_in_python(operation: str, arguments: dict[str, Any]) -> Tensor:
    """What the operation gives without the direct way."""
    values = list(arguments.values())
    run = {
        "int8_linear": ops.int8_linear,
        "masked_linear": ops.masked_linear,
        "sparse_linear": packed_sparse_linear,
    }[operation]
    return run(*values, backend="cpu")


@operations
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(M,), (), (2, 2), (1, M, 1)], ids=str)
@pytest.mark.parametrize("has_bias", [True, False])
def test_it_gives_the_bits_of_the_other_way(
    operation: str, dtype: torch.dtype, shape: tuple[int, ...], has_bias: bool
) -> None:
    arguments = ARGUMENTS[operation](dtype)
    arguments["x"] = torch.randn(*shape, K).to(dtype)
    if not has_bias:
        arguments["bias"] = None
    found = direct.run(operation, *arguments.values())
    assert found is not None
    assert (found.shape, found.dtype) == ((*shape, N), dtype)
    assert torch.equal(found, looked_at_in_python(operation, arguments))


@settings(deadline=None, max_examples=60)
@given(
    operation=st.sampled_from(["int8_linear", "masked_linear"]),
    rows=st.integers(1, 9),
    more=st.integers(0, 5),
    step=st.integers(1, 3),
    variants=st.integers(0, 3),
)
def test_rows_may_lie_apart(operation: str, rows: int, more: int, step: int, variants: int) -> None:
    arguments = ARGUMENTS[operation]()
    arguments["x"] = torch.randn(step * rows, K + more)[::step, :K]
    name = "qweight" if operation == "int8_linear" else "weight"
    wider = torch.cat([arguments[name], arguments[name][:, :5]], 1)
    arguments[name] = wider[:, :K]
    if operation == "masked_linear" and variants:
        arguments["mask"] = ops.pack_mask(torch.rand(2 * variants, N, K + 8) < 0.5)[::2, :, : K // 8]
    found = direct.run(operation, *arguments.values())
    assert found is not None
    assert torch.equal(found, looked_at_in_python(operation, arguments))


class Subclass(torch.Tensor):
    """Whose values could be anything."""


UNUSUAL: dict[str, Callable[[Any], Any]] = {
    "no tensor": lambda value: value.tolist(),
    "a subclass": lambda value: value.as_subclass(Subclass),
    "other elements": lambda value: value.double(),
    "negated": torch._neg_view,
    "sparse": Tensor.to_sparse,
    "without data": lambda value: value.to("meta"),
    "elements apart": lambda value: value.repeat_interleave(2, -1)[..., ::2],
    "a dimension more": lambda value: value[None, None],
    "one less in the last dimension": lambda value: value[..., :-1],
    "nothing": lambda value: value[..., :0],
}
OF_ANY_SHAPE = {"a dimension more"}  # as x may be


@operations
@pytest.mark.parametrize("change", UNUSUAL)
def test_what_is_unusual_is_left_to_python(operation: str, change: str) -> None:
    arguments = ARGUMENTS[operation]()
    assert direct.run(operation, *arguments.values()) is not None
    for name, value in arguments.items():
        if isinstance(value, int) or (name == "x" and change in OF_ANY_SHAPE):
            continue
        changed = arguments | {name: UNUSUAL[change](value)}
        assert direct.run(operation, *changed.values()) is None, name


@operations
def test_what_wants_a_gradient_is_left_to_python(operation: str) -> None:
    arguments = ARGUMENTS[operation]()
    for name, value in arguments.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            changed = arguments | {name: nn.Parameter(value)}
            assert direct.run(operation, *changed.values()) is None, name
            with torch.no_grad():
                assert direct.run(operation, *changed.values()) is not None, name


@operations
def test_under_forward_derivatives_it_is_left_to_python(operation: str) -> None:
    with torch.autograd.forward_ad.dual_level():
        assert direct.run(operation, *ARGUMENTS[operation]().values()) is None


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_scale_that_is_not_finite_is_left_to_python(value: float) -> None:
    arguments = int8_arguments()
    for at in (0, 7, N - 1):
        scale = torch.rand(N)
        scale[at] = value
        assert direct.run("int8_linear", *(arguments | {"scale": scale}).values()) is None


def test_bits_behind_the_last_column_are_left_to_python() -> None:
    arguments = {"x": torch.randn(M, 37), "weight": torch.randn(N, 37)}
    mask = ops.pack_mask(torch.rand(N, 37) < 0.5)
    assert direct.run("masked_linear", *arguments.values(), mask, None) is None


def test_steps_that_do_not_fit_are_refused_as_by_the_other_way() -> None:
    arguments = sparse_arguments()
    arguments["steps"] = arguments["steps"] + 1
    with pytest.raises(ValueError, match="steps: their sum does not fit"):
        direct.run("sparse_linear", *arguments.values())


@operations
def test_without_the_table_of_functions_all_is_done_in_python(
    operation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ARGUMENTS[operation]()
    expected = direct.run(operation, *arguments.values())
    monkeypatch.setattr(direct, "_kernel", lambda operation: None)
    assert direct.run(operation, *arguments.values()) is None
    assert torch.equal(looked_at_in_python(operation, arguments), expected)
