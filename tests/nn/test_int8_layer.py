import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from same_state import assert_same_state

import dtm_fast as dtm
from dtm_fast import nn, ops

DTYPES = [torch.float32, torch.bfloat16]


def random_layer(
    features: tuple[int, int] = (37, 11), bias: bool = True, dtype: torch.dtype = torch.float32
) -> tuple[torch.nn.Linear, nn.Int8Linear]:
    torch.manual_seed(0)
    linear = torch.nn.Linear(*features, bias, dtype=dtype)
    return linear, nn.Int8Linear.from_linear(linear)


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_gives_what_the_operation_gives(bias: bool, dtype: torch.dtype) -> None:
    linear, layer = random_layer(bias=bias, dtype=dtype)
    x = torch.randn(2, 5, 37).to(dtype)
    y = layer(x)
    assert torch.equal(y, ops.int8_linear(x, *ops.quantize_int8(linear.weight), linear.bias))
    assert float((y - linear(x)).norm() / linear(x).norm()) < 0.02


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
def test_mixed_precision_casts_input_and_bias(bias: bool) -> None:
    linear, layer = random_layer(bias=bias)
    half = None if linear.bias is None else linear.bias.bfloat16()
    for x in (torch.randn(5, 37), torch.randn(5, 37).bfloat16()):
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        assert torch.equal(y, ops.int8_linear(x.bfloat16(), layer.weight, layer.weight_scale[:, 0], half))


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
def test_of_a_float16_layer_it_takes_what_it_can_multiply(dtype: torch.dtype) -> None:
    linear, layer = random_layer(dtype=torch.float16)
    x = torch.randn(5, 37).to(dtype)
    expected = ops.int8_linear(x, *ops.quantize_int8(linear.weight), linear.bias.float())
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
def test_back_to_a_linear_it_is_the_treatment_int8(bias: bool, dtype: torch.dtype) -> None:
    linear, layer = random_layer(bias=bias, dtype=dtype)
    back = layer.to_linear(dtype)
    assert torch.equal(back.weight, dtm.Int8().compress(linear.weight))
    assert back.bias is linear.bias is None or torch.equal(back.bias, linear.bias)
    assert back.weight.requires_grad
    assert layer.to_linear().weight.dtype == torch.float32


def test_a_new_layer_has_the_shape_of_a_torch_linear_and_waits_for_its_weights() -> None:
    layer = nn.Int8Linear(37, 11, dtype=torch.bfloat16)
    assert (layer.in_features, layer.out_features) == (37, 11)
    assert {name: (value.dtype, list(value.shape)) for name, value in layer.state_dict().items()} == {
        "weight": (torch.int8, [11, 37]),
        "weight_scale": (torch.float32, [11, 1]),
        "bias": (torch.bfloat16, [11]),
    }
    assert list(layer.parameters()) == []
    assert repr(layer) == "Int8Linear(in_features=37, out_features=11, bias=True)"
    x = torch.randn(3, 37).bfloat16()
    assert torch.equal(layer(x), torch.zeros(3, 11).bfloat16())
    assert nn.Int8Linear(37, 11, bias=False).bias is None
    assert not isinstance(layer, torch.nn.Linear)


@pytest.mark.parametrize("training", [False, True])
def test_a_layer_is_in_the_mode_of_the_one_it_replaces(training: bool) -> None:
    linear = torch.nn.Linear(8, 4).train(training)
    layer = nn.Int8Linear.from_linear(linear)
    assert layer.training == layer.to_linear().training == training


def test_it_does_not_follow_the_layer_it_was_made_of() -> None:
    linear, layer = random_layer()
    before = copy.deepcopy(layer)
    with torch.no_grad():
        linear.weight.zero_()
        linear.bias.zero_()
    assert_same_state(layer, before)


CASTS = {
    "to": lambda layer: layer.to(torch.bfloat16),
    "bfloat16": lambda layer: layer.bfloat16(),
    "half": lambda layer: layer.half(),
    "double": lambda layer: layer.double(),
    "type": lambda layer: layer.type(torch.bfloat16),
    "inside a model": lambda layer: torch.nn.Sequential(layer).to("cpu", torch.bfloat16)[0],
}


@pytest.mark.parametrize("cast", CASTS)
def test_casting_leaves_the_weight_and_its_scale(cast: str) -> None:
    _, layer = random_layer()
    weight, scale = layer.weight.clone(), layer.weight_scale.clone()
    bias = CASTS[cast](layer).bias
    assert bias.dtype in (torch.bfloat16, torch.float16, torch.float64)
    assert layer.weight.dtype == torch.int8
    assert layer.weight_scale.dtype == torch.float32
    assert torch.equal(layer.weight, weight)
    assert torch.equal(layer.weight_scale, scale)


def test_it_moves_to_and_from_the_meta_device() -> None:
    layer = nn.Int8Linear(37, 11, device="meta").to(torch.bfloat16)
    assert {each.device.type for each in layer.buffers()} == {"meta"}
    assert layer.weight_scale.dtype == torch.float32
    layer = layer.to_empty(device="cpu")
    assert {each.device.type for each in layer.buffers()} == {"cpu"}
    assert layer.weight_scale.dtype == torch.float32
    _, other = random_layer()
    assert {each.device.type for each in other.to("meta", torch.bfloat16).buffers()} == {"meta"}


@pytest.mark.parametrize("bias", [False, True])
def test_copies_and_checkpoints_keep_every_bit(bias: bool) -> None:
    _, layer = random_layer(bias=bias)
    assert_same_state(copy.deepcopy(layer), layer)
    assert_same_state(pickle.loads(pickle.dumps(layer)), layer)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    state = torch.load(file)
    loaded = nn.Int8Linear(37, 11, bias)
    loaded.load_state_dict(state)
    assert_same_state(loaded, layer)
    empty = nn.Int8Linear(37, 11, bias, device="meta")
    empty.load_state_dict(state, assign=True)
    assert_same_state(empty, layer)
    x = torch.randn(3, 37)
    assert torch.equal(empty(x), layer(x))


@pytest.mark.parametrize("assign", [False, True])
def test_an_int_quantized_checkpoint_loads_as_it_is(assign: bool) -> None:
    """compressed-tensors writes the scale [N, 1] in the model's dtype."""
    _, expected = random_layer(dtype=torch.bfloat16)
    scale = expected.weight_scale.bfloat16()
    checkpoint = {"0.weight": expected.weight, "0.weight_scale": scale, "0.bias": expected.bias}
    given = dict(checkpoint)
    model = torch.nn.Sequential(nn.Int8Linear(37, 11, device="meta" if assign else None))
    model.load_state_dict(checkpoint, assign=assign)
    assert model[0].weight_scale.dtype == torch.float32
    assert torch.equal(model[0].weight_scale, scale.float())
    assert all(checkpoint[name] is value for name, value in given.items())


def test_wrong_checkpoints() -> None:
    linear, layer = random_layer()
    before = copy.deepcopy(layer)
    with pytest.raises(RuntimeError, match=r"0.weight: expected dtype torch.int8, got torch.float32"):
        torch.nn.Sequential(layer).load_state_dict(torch.nn.Sequential(linear).state_dict(), strict=False)
    assert_same_state(layer, before)
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"weight_scale\""):
        layer.load_state_dict({"weight": layer.weight, "bias": layer.bias})
    with pytest.raises(RuntimeError, match="size mismatch for weight_scale"):
        layer.load_state_dict(layer.state_dict() | {"weight_scale": torch.ones(11)})


def test_gradients_are_refused_where_they_are_needed() -> None:
    _, layer = random_layer()
    layer.requires_grad_()  # a no-op: there is nothing to train
    x = torch.randn(3, 37)
    assert not layer(x).requires_grad
    with pytest.raises(RuntimeError, match="int8_linear has no backward"):
        layer(x.requires_grad_())
    with torch.no_grad():
        layer(x)


@pytest.mark.once
@pytest.mark.parametrize("dynamic", [False, True])
def test_it_compiles_without_graph_breaks(dynamic: bool) -> None:
    torch.compiler.reset()
    model = torch.nn.Sequential(random_layer((37, 11))[1], torch.nn.SiLU(), random_layer((11, 5))[1])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (3, 8):
        x = torch.randn(rows, 37)
        assert torch.equal(compiled(x), model(x))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_one_output_and_no_sizes() -> None:
    for features in ((5, 1), (1, 1), (0, 3), (3, 0)):
        linear, layer = random_layer(features)
        x = torch.randn(4, features[0])
        assert layer(x).shape == (4, features[1])
        assert torch.allclose(layer(x), F.linear(x, linear.weight, linear.bias), atol=0.1)


def test_wrong_arguments() -> None:
    with pytest.raises(TypeError, match=r"linear: expected a torch.nn.Linear, got Conv1d"):
        nn.Int8Linear.from_linear(torch.nn.Conv1d(3, 4, 1))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"weight: expected dtype .*, got torch.float64"):
        nn.Int8Linear.from_linear(torch.nn.Linear(3, 4, dtype=torch.float64))
    linear = torch.nn.Linear(3, 4)
    with torch.no_grad():
        linear.weight[1, 2] = torch.nan
    with pytest.raises(ValueError, match=r"weight: expected finite values, got 1 NaN or infinite of 12"):
        nn.Int8Linear.from_linear(linear)
    with pytest.raises(ValueError, match=r"qweight: expected size 6 in dimension 1 \(K of x\)"):
        nn.Int8Linear(5, 4)(torch.ones(2, 6))
