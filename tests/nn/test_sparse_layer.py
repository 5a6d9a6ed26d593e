import copy
import io
import pickle
from typing import Any

import pytest
import torch
from same_state import assert_same_state

from dtm_fast import nn, ops

DTYPES = [torch.float32, torch.bfloat16]


def random_layer(
    features: tuple[int, int] = (300, 37), bias: bool = True, dtype: torch.dtype = torch.float32
) -> tuple[torch.nn.Linear, torch.Tensor, nn.SparseLinear]:
    torch.manual_seed(0)
    linear = torch.nn.Linear(*features, bias, dtype=dtype)
    mask = torch.rand(linear.weight.shape) < 0.3
    return linear, mask, nn.SparseLinear.from_linear(linear, mask)


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("packed", [False, True])
def test_it_gives_what_the_operation_gives(bias: bool, dtype: torch.dtype, packed: bool) -> None:
    linear, mask, _ = random_layer(bias=bias, dtype=dtype)
    layer = nn.SparseLinear.from_linear(linear, ops.pack_mask(mask) if packed else mask)
    x = torch.randn(2, 5, 300).to(dtype)
    weight = ops.SparseWeight.pack(linear.weight, ops.pack_mask(mask))
    assert torch.equal(layer(x), ops.sparse_linear(x, weight, linear.bias))
    assert torch.equal(layer.weight.to_dense(), torch.where(mask, linear.weight, 0).float())


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
def test_mixed_precision_casts_input_and_bias(bias: bool) -> None:
    linear, mask, layer = random_layer(bias=bias)
    weight = ops.SparseWeight.pack(linear.weight, ops.pack_mask(mask))
    half = None if linear.bias is None else linear.bias.bfloat16()
    for x in (torch.randn(5, 300), torch.randn(5, 300).bfloat16()):
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        assert torch.equal(y, ops.sparse_linear(x.bfloat16(), weight, half))


def test_without_a_mask_it_keeps_what_is_not_zero() -> None:
    linear, mask, layer = random_layer()
    pruned = copy.deepcopy(linear)
    pruned.weight.data[~mask] = 0.0
    assert_same_state(nn.SparseLinear.from_linear(pruned), layer)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_back_to_a_linear_it_is_the_pruned_one(bias: bool, dtype: torch.dtype) -> None:
    linear, mask, layer = random_layer(bias=bias, dtype=dtype)
    back = layer.to_linear(dtype)
    assert torch.equal(back.weight, torch.where(mask, linear.weight, 0))
    assert back.bias is linear.bias is None or torch.equal(back.bias, linear.bias)
    assert back.weight.requires_grad


def test_a_new_layer_keeps_nothing() -> None:
    layer = nn.SparseLinear(300, 37, dtype=torch.bfloat16)
    assert repr(layer) == "SparseLinear(in_features=300, out_features=37, bias=True)"
    assert layer.weight.nnz == 0
    assert list(layer.parameters()) == []
    x = torch.randn(3, 300).bfloat16()
    assert torch.equal(layer(x), torch.zeros(3, 37).bfloat16())
    assert nn.SparseLinear(300, 37, bias=False).bias is None
    assert_same_state(
        nn.SparseLinear(300, 600), nn.SparseLinear.from_linear(zeroed(torch.nn.Linear(300, 600)))
    )


def zeroed(linear: torch.nn.Linear) -> torch.nn.Linear:
    for each in linear.parameters():
        each.data.zero_()
    return linear


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_state_goes_from_layer_to_layer(device: str) -> None:
    _, _, layer = random_layer()
    stream = io.BytesIO()
    torch.save(layer.state_dict(), stream)
    stream.seek(0)
    other = nn.SparseLinear(300, 37, device=device)
    other.load_state_dict(torch.load(stream), assign=device == "meta")
    assert_same_state(layer, other)
    x = torch.randn(3, 300)
    assert torch.equal(layer(x), other(x))


def test_copies_and_pickles_are_the_same_layer() -> None:
    _, _, layer = random_layer()
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert_same_state(layer, other)


def test_casting_leaves_the_weight_as_it_is() -> None:
    _linear, _mask, layer = random_layer()
    before = layer.weight.to_dense()
    layer.to(torch.bfloat16)
    assert layer.bias is not None
    assert layer.bias.dtype == torch.bfloat16
    assert torch.equal(layer.weight.to_dense(), before)
    x = torch.randn(3, 300).bfloat16()
    expected = ops.sparse_linear(x, layer.weight, layer.bias)
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize(
    ("name", "damage", "complaint"),
    [
        ("columns", lambda value: value + 1, "columns: expected"),
        ("steps", lambda value: value + 1, "steps|values"),
        ("rows", lambda value: value * 0, "rows: expected every row"),
        ("values", lambda value: value[:-1], "values: "),
        ("values", lambda value: value.half(), "values: expected dtype"),
    ],
)
def test_a_damaged_state_is_refused_and_the_layer_left_alone(name: str, damage: Any, complaint: str) -> None:
    _, _, layer = random_layer()
    before = copy.deepcopy(layer)
    state = dict(layer.state_dict())
    state[name] = damage(state[name])
    with pytest.raises(RuntimeError, match=complaint):
        layer.load_state_dict(state)
    assert_same_state(layer, before)


def test_missing_and_unexpected_keys_are_named() -> None:
    _, _, layer = random_layer()
    state = dict(layer.state_dict())
    del state["columns"]
    state["other"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match=r"(?s)columns.*other"):
        layer.load_state_dict(state)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("kept", [("values",), ("values", "columns", "steps"), ("rows", "steps")])
def test_a_part_of_the_packed_weight_is_refused_and_none_of_it_loaded(
    kept: tuple[str, ...], strict: bool
) -> None:
    _, _, layer = random_layer()
    model = torch.nn.Sequential(nn.SparseLinear.from_linear(zeroed(torch.nn.Linear(300, 37))))
    before = copy.deepcopy(model[0])
    missing = ", ".join(f"0.{each}" for each in ("values", "columns", "rows", "steps") if each not in kept)
    state = {f"0.{name}": value for name, value in layer.state_dict().items() if name in (*kept, "bias")}
    complaint = f"{missing}: missing; values, columns, rows and steps come together"
    with pytest.raises(RuntimeError, match=complaint):
        model.load_state_dict(state, strict=strict)
    assert_same_state(_without_bias(model[0]), _without_bias(before))


def _without_bias(layer: nn.SparseLinear) -> nn.SparseLinear:
    other = copy.deepcopy(layer)
    other.bias = None
    return other


def test_a_state_without_the_packed_weight_leaves_it() -> None:
    _, _, layer = random_layer()
    before = copy.deepcopy(layer)
    found = layer.load_state_dict({"bias": layer.bias}, strict=False)
    assert found.missing_keys == ["values", "columns", "rows", "steps"]
    assert_same_state(layer, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_another_type_is_the_biases_alone(dtype: torch.dtype) -> None:
    _, _, layer = random_layer()
    before = layer.state_dict()
    dtypes = {name: value.dtype for name, value in before.items()} | {"bias": dtype}
    layer.type(dtype)
    assert {name: value.dtype for name, value in layer.state_dict().items()} == dtypes
    assert all(
        torch.equal(value, before[name]) for name, value in layer.state_dict().items() if name != "bias"
    )


@pytest.mark.once
@torch.no_grad()
def test_it_compiles_whole() -> None:
    _, _, layer = random_layer()
    x = torch.randn(3, 300)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))


def test_a_gradient_through_it_is_refused() -> None:
    _, _, layer = random_layer()
    with pytest.raises(RuntimeError, match="no backward"):
        layer(torch.randn(3, 300, requires_grad=True))


def test_bad_arguments_are_named() -> None:
    linear, mask, _ = random_layer()
    with pytest.raises(TypeError, match="linear: expected a torch\\.nn\\.Linear, got Identity"):
        nn.SparseLinear.from_linear(torch.nn.Identity())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"mask: expected shape \[37, 300\], got \[36, 300\]"):
        nn.SparseLinear.from_linear(linear, mask[:-1])
    with pytest.raises(TypeError, match="mask"):
        nn.SparseLinear.from_linear(linear, mask.float())
