import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from same_state import assert_same_state

from dtm_fast import nn, ops

DTYPES = [torch.float32, torch.bfloat16]


# What float32 sums of some hundred terms near 1 differ by when their order differs.
ANOTHER_ORDER = 1e-5


def random_layer(
    features: tuple[int, int] = (37, 11), bias: bool = True, dtype: torch.dtype = torch.float32
) -> tuple[torch.nn.Linear, nn.MaskedLinear, torch.Tensor]:
    torch.manual_seed(0)
    linear = torch.nn.Linear(*features, bias, dtype=dtype)
    kept = torch.rand(linear.weight.shape) < 0.5
    return linear, nn.MaskedLinear.from_linear(linear, kept), kept


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_gives_what_the_operation_gives(bias: bool, dtype: torch.dtype) -> None:
    linear, layer, kept = random_layer(bias=bias, dtype=dtype)
    x = torch.randn(2, 5, 37).to(dtype)
    y = layer(x)
    assert torch.equal(y, ops.masked_linear(x, linear.weight, ops.pack_mask(kept), linear.bias))
    plain = F.linear(x, torch.where(kept, linear.weight, 0), linear.bias)
    assert float((y - plain).norm() / plain.norm()) < (2**-20 if dtype == torch.float32 else 2**-8)


def test_weight_and_bias_are_shared_and_the_mask_may_come_packed() -> None:
    linear, layer, kept = random_layer()
    packed = ops.pack_mask(kept)
    other = nn.MaskedLinear.from_linear(linear, packed)
    assert layer.weight is other.weight is linear.weight
    assert layer.bias is other.bias is linear.bias
    assert other.mask is packed
    assert torch.equal(layer.mask, packed)
    everything = nn.MaskedLinear.from_linear(linear)
    assert bool(ops.unpack_mask(everything.mask, 37).all())
    x = torch.randn(3, 37)
    assert torch.allclose(everything(x), linear(x), rtol=0, atol=ANOTHER_ORDER)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_back_to_a_linear_the_mask_is_applied_to_a_copy(bias: bool, dtype: torch.dtype) -> None:
    linear, layer, kept = random_layer(bias=bias, dtype=dtype)
    before = linear.weight.detach().clone()
    back = layer.to_linear()
    assert torch.equal(back.weight, torch.where(kept, before, 0))
    assert back.weight.requires_grad
    assert back.bias is linear.bias is None or torch.equal(back.bias, linear.bias)
    with torch.no_grad():
        for each in back.parameters():
            each.fill_(3.0)
    assert torch.equal(linear.weight, before)
    assert linear.bias is None or not bool((linear.bias == 3).any())


def test_a_new_layer_starts_as_a_torch_linear_and_keeps_everything() -> None:
    torch.manual_seed(3)
    linear = torch.nn.Linear(37, 11, dtype=torch.bfloat16)
    torch.manual_seed(3)
    layer = nn.MaskedLinear(37, 11, dtype=torch.bfloat16)
    assert torch.equal(layer.weight, linear.weight)
    assert torch.equal(layer.bias, linear.bias)
    assert bool(ops.unpack_mask(layer.mask, 37).all())
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]
    assert (layer.in_features, layer.out_features) == (37, 11)
    assert repr(layer) == "MaskedLinear(in_features=37, out_features=11, bias=True)"
    assert not isinstance(layer, torch.nn.Linear)
    without = nn.MaskedLinear(37, 11, bias=False)
    assert without.bias is None
    assert list(without.state_dict()) == ["weight", "mask"]


@pytest.mark.parametrize("training", [False, True])
def test_a_layer_is_in_the_mode_of_the_one_it_replaces(training: bool) -> None:
    linear = torch.nn.Linear(8, 4).train(training)
    layer = nn.MaskedLinear.from_linear(linear)
    assert layer.training == layer.to_linear().training == training


@pytest.mark.parametrize("cast", [nn.MaskedLinear.to, nn.MaskedLinear.type], ids=["to", "type"])
def test_casting_leaves_the_mask(cast: Callable[[nn.MaskedLinear, torch.dtype], object]) -> None:
    _, layer, kept = random_layer()
    cast(layer, torch.bfloat16)
    assert layer.mask.dtype == torch.uint8
    assert layer.weight.dtype == layer.bias.dtype == torch.bfloat16
    assert torch.equal(ops.unpack_mask(layer.mask, 37), kept)
    assert layer(torch.randn(3, 37).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("bias", [False, True])
def test_copies_and_checkpoints_keep_every_bit(bias: bool) -> None:
    _, layer, _ = random_layer(bias=bias)
    assert_same_state(copy.deepcopy(layer), layer)
    assert_same_state(pickle.loads(pickle.dumps(layer)), layer)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    state = torch.load(file)
    loaded = nn.MaskedLinear(37, 11, bias)
    loaded.load_state_dict(state)
    assert_same_state(loaded, layer)
    empty = nn.MaskedLinear(37, 11, bias, device="meta")
    assert {each.device.type for each in (*empty.parameters(), *empty.buffers())} == {"meta"}
    empty.load_state_dict(state, assign=True)
    assert_same_state(empty, layer)
    assert all(each.requires_grad for each in empty.parameters())
    x = torch.randn(3, 37)
    assert torch.equal(empty(x), layer(x))
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"mask\""):
        layer.load_state_dict({name: value for name, value in state.items() if name != "mask"})


def two_layers(sparsity: float) -> torch.nn.Sequential:
    """A small network whose linear layers are masked at random."""
    return torch.nn.Sequential(
        *(
            nn.MaskedLinear.from_linear(each, torch.rand(each.weight.shape) > sparsity)
            if isinstance(each, torch.nn.Linear)
            else each
            for each in (torch.nn.Linear(12, 64), torch.nn.Tanh(), torch.nn.Linear(64, 3))
        )
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_training_lowers_the_loss_and_moves_only_what_is_kept(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = two_layers(0.6).to(dtype)
    x = torch.randn(256, 12)
    label = (x[:, :3] + 0.5 * x[:, 3:6] * x[:, 6:9]).argmax(1)
    layers = [each for each in model if isinstance(each, nn.MaskedLinear)]
    masked_out = [~ops.unpack_mask(each.mask, each.in_features) for each in layers]
    start = [each.weight.detach().clone() for each in layers]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    losses = []
    for _ in range(40):
        loss = F.cross_entropy(model(x.to(dtype)).float(), label)
        optimizer.zero_grad()
        loss.backward()
        for layer, dropped in zip(layers, masked_out, strict=True):
            assert layer.weight.grad is not None
            assert bool((layer.weight.grad[dropped] == 0).all())
            assert bool((layer.weight.grad[~dropped] != 0).any())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    for layer, dropped, before in zip(layers, masked_out, start, strict=True):
        assert torch.equal(layer.weight[dropped], before[dropped])
        assert not torch.equal(layer.weight, before)


@pytest.mark.parametrize("bias", [False, True])
def test_mixed_precision_casts_as_it_does_for_a_torch_linear(bias: bool) -> None:
    linear, layer, _ = random_layer(bias=bias)
    for x in (torch.randn(5, 37), torch.randn(5, 37).bfloat16()):
        with torch.autocast("cpu", torch.bfloat16):
            y, expected = layer(x), layer.to_linear()(x)
        assert y.dtype == expected.dtype == torch.bfloat16
        # Both round to bfloat16, up to 2^-8 each.
        assert torch.allclose(y, expected, rtol=2**-7, atol=2**-7)
        y.float().sum().backward()
    assert linear.weight.grad is not None
    assert linear.weight.grad.dtype == torch.float32


def test_two_masks_of_one_weight_add_their_gradients() -> None:
    linear, layer, kept = random_layer()
    other = nn.MaskedLinear.from_linear(linear, ~kept)
    x = torch.randn(5, 37)
    (layer(x) + other(x)).sum().backward()
    expected = x.sum(0).expand(11, 37)
    assert linear.weight.grad is not None
    assert torch.allclose(linear.weight.grad, expected, rtol=0, atol=ANOTHER_ORDER)


@pytest.mark.once
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_training_step_without_graph_breaks(dynamic: bool) -> None:
    torch.compiler.reset()
    torch.manual_seed(0)
    model = two_layers(0.5)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (6, 9):
        x = torch.randn(rows, 12)
        found = []
        for each in (model, compiled):
            model.zero_grad()
            each(x).square().sum().backward()
            found.append([parameter.grad.clone() for parameter in model.parameters()])
        for eager, ours in zip(*found, strict=True):
            assert float((ours - eager).norm() / eager.norm()) < 2**-20


def test_wrong_arguments() -> None:
    linear, _, kept = random_layer()

    def run(mask: torch.Tensor) -> None:
        nn.MaskedLinear.from_linear(linear, mask)

    with pytest.raises(TypeError, match=r"linear: expected a torch.nn.Linear, got Conv1d"):
        nn.MaskedLinear.from_linear(torch.nn.Conv1d(3, 4, 1))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"linear.weight: expected dtype .*bfloat16, got torch.float16"):
        nn.MaskedLinear.from_linear(torch.nn.Linear(3, 4, dtype=torch.float16))
    with pytest.raises(TypeError, match=r"mask: expected dtype torch.bool or torch.uint8, got torch.float32"):
        run(kept.float())
    with pytest.raises(ValueError, match=r"mask: expected size 37 in dimension 1 \(K of linear\)"):
        run(kept[:, :36])
    with pytest.raises(ValueError, match=r"mask: expected size 11 in dimension 0 \(N of linear\)"):
        run(kept[:10])
    with pytest.raises(ValueError, match=r"mask: expected shape \[N, K\] or, packed, \[N, ceil\(K / 8\)\]"):
        run(kept[None])
    packed = ops.pack_mask(kept)
    with pytest.raises(ValueError, match=r"mask: expected size 5 in dimension 1 \(ceil\(K / 8\) for K = 37"):
        run(packed[:, :4])
    with pytest.raises(ValueError, match=r"mask: mask bits out of range"):
        run(packed | 128)
    with pytest.raises(ValueError, match=r"mask: expected device cpu, that of linear, got meta"):
        run(packed.to("meta"))
