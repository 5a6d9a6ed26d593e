import math
from dataclasses import replace

import plain_loop
import pytest
import tiny
import torch
import torch.nn.functional as F
from recoveries import (
    PRUNED,
    SMALL,
    UP,
    before_each_step,
    dropped_by_sorting,
    half_of,
    interrupted,
    random_tokens,
    stop_at,
)
from safetensors.torch import load_file
from same_state import assert_same_state
from torch.func import functional_call
from transformers import AutoModelForCausalLM

from dtm_fast import Prune
from dtm_fast.compression import Drop
from dtm_fast.compression.recovery import recover
from dtm_fast.compression.recovery_settings import Recovery
from dtm_fast.model import Decoder

pytestmark = pytest.mark.once


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_dropped_weights_are_exactly_0_as_long_as_the_mask_holds(family, tmp_path):
    model = tiny.model_of(family)
    components = Decoder.of(model).components
    dropped = {path: dropped_by_sorting(each.weight, 0.5) for path, each in components.items()}
    steps = replace(SMALL, masked_steps=6, unmasked_steps=3, weight_decay=0.5)
    returned = []

    def look(step: int) -> None:
        now = [components[path].weight[mask] for path, mask in dropped.items()]
        returned.append(sum(int((each != 0).sum()) for each in now))
        if step <= 6:
            assert not any(torch.signbit(each).any() for each in now)

    before_each_step(model, look)
    recover(model, half_of(model), random_tokens(), steps, tmp_path / "r")
    total = sum(int(mask.sum()) for mask in dropped.values())
    assert returned[:7] == [0] * 7  # before each of the masked steps and after the last
    assert returned[8] > 0.9 * total
    for path, mask in dropped.items():
        assert (components[path].weight[~mask] != 0).all()


def test_the_moments_of_dropped_weights_are_0_and_those_of_others_are_not(tmp_path):
    state = interrupted(tmp_path / "r", 4)
    model = tiny.model_of("llama")
    for path, prune in PRUNED.items():
        mask = dropped_by_sorting(model.get_submodule(path).weight, prune.sparsity)
        for moment in ("exp_avg", "exp_avg_sq"):
            values = state[f"{path}.weight/{moment}"]
            assert not values[mask].any()
            assert (values[~mask] != 0).all()
    assert state["model.norm.weight/step"] == 4


def test_dropped_weights_do_not_lengthen_the_gradient(tmp_path):
    # After one step the first moment is a tenth of the gradient, which has been cut to the length of 0.01.
    state = interrupted(tmp_path / "r", 1, replace(SMALL, clip=0.01, checkpoint_every=1))
    squares = sum(
        float((10 * value).double().square().sum())
        for name, value in state.items()
        if "exp_avg" in name and "_sq" not in name
    )
    assert math.sqrt(squares) == pytest.approx(0.01, rel=1e-4)


def test_without_unmasked_steps_the_model_stays_as_sparse_as_it_was_made(tmp_path):
    model, down = tiny.model_of("llama"), "model.layers.1.mlp.down_proj"
    settings = replace(SMALL, unmasked_steps=0)
    recover(model, {UP: Prune("2:4"), down: Drop()}, random_tokens(), settings, tmp_path / "r")
    left = model.get_submodule(UP).weight.detach().reshape(-1, 4)
    assert ((left != 0).sum(1) == 2).all()
    before = tiny.model_of("llama").get_submodule(UP).weight.detach().reshape(-1, 4)
    assert torch.equal(left != 0, before.abs() >= before.abs().sort(1).values[:, 2:3])
    assert not model.get_submodule(down).weight.any()


# Against a training that is written otherwise.


def plain_training(model, sparsities, tokens, settings) -> list[float]:
    """The mask is a factor of the weight inside the model, so that autograd alone gives the gradients."""
    parameters = dict(model.named_parameters())
    masks = {}
    for path, prune in sparsities.items():
        weight = parameters[f"{path}.weight"]
        masks[f"{path}.weight"] = (~dropped_by_sorting(weight, prune.sparsity)).float()
        weight.data = plain_loop.prune(weight.data, prune.sparsity)
    decayed = [p for name, p in parameters.items() if "norm" not in name]
    others = [p for name, p in parameters.items() if "norm" in name]
    optimizer = torch.optim.AdamW(
        [{"params": decayed}, {"params": others, "weight_decay": 0}],
        betas=(0.9, 0.95),
        weight_decay=settings.weight_decay,
    )
    draw = torch.Generator().manual_seed(settings.seed)
    order = torch.cat([torch.randperm(len(tokens), generator=draw) for _ in range(30)]).tolist()
    losses = []
    total = settings.masked_steps + settings.unmasked_steps
    for step in range(total):
        rows = tokens[order[step * settings.batch : (step + 1) * settings.batch]]
        held = masks if step < settings.masked_steps else {}
        used = {name: p * held[name] if name in held else p for name, p in parameters.items()}
        logits = functional_call(model, used, (rows[:, :-1],)).logits
        loss = F.cross_entropy(logits.mT, rows[:, 1:])
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        length = math.sqrt(sum(float(g.double().square().sum()) for g in gradients))
        for p, g in zip(parameters.values(), gradients, strict=True):
            p.grad = g * min(1.0, settings.clip / length)
        for group in optimizer.param_groups:
            # 5% of fewer than 30 steps is one: the first has the highest rate.
            group["lr"] = settings.learning_rate * (0.55 + 0.45 * math.cos(math.pi * step / (total - 1)))
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("clip", [0.3, 1000.0])
def test_it_trains_as_a_plain_loop_of_torch(tied, clip, tmp_path):
    start, model, other = (tiny.model_of("llama", tie_word_embeddings=tied) for _ in range(3))
    tokens, settings = random_tokens(), replace(SMALL, clip=clip, weight_decay=0.1)
    found = recover(model, PRUNED, tokens, settings, tmp_path / "r")
    losses = plain_training(other, PRUNED, tokens, settings)
    assert found.losses == pytest.approx(losses, rel=1e-5)
    for name, weight in model.named_parameters():
        # As a whole: where a gradient is all rounding, Adam makes a step of it as of any other.
        expected, before = other.get_parameter(name), start.get_parameter(name)
        assert (weight - expected).norm() < 1e-4 * (expected - before).norm(), name


def test_the_gradient_is_that_of_the_models_own_loss_whole_or_in_parts(tmp_path):
    expected = tiny.model_of("llama")
    tokens = random_tokens(4)
    expected(tokens, labels=tokens).loss.backward()
    for micro_batch in (1, 3, 4, 100):
        settings = replace(SMALL, clip=1e6, micro_batch=micro_batch, checkpoint_every=1)
        model, folder = tiny.model_of("llama"), tmp_path / str(micro_batch)
        stop_at(model, -(-4 // micro_batch))  # at the first part of the second step
        with pytest.raises(KeyboardInterrupt):
            recover(model, {}, tokens, settings, folder)
        state = load_file(folder / "checkpoint-1" / "optimizer.safetensors")
        for name, parameter in expected.named_parameters():
            torch.testing.assert_close(10 * state[f"{name}/exp_avg"], parameter.grad, rtol=1e-4, atol=1e-6)


def test_losses_are_the_models_own_before_each_update(tmp_path):
    model, tokens, expected = tiny.model_of("llama"), random_tokens(4), []

    def look(_: int) -> None:
        with torch.no_grad():
            model._forward_pre_hooks.clear()
            expected.append(float(model(tokens, labels=tokens).loss))
        before_each_step(model, look)

    before_each_step(model, look)
    found = recover(model, PRUNED, tokens, SMALL, tmp_path / "r")
    assert found.losses == pytest.approx(expected, rel=1e-5)


def test_weight_decay_shrinks_matrices_and_embeddings_only(tmp_path):
    start = {name: weight.detach().clone() for name, weight in tiny.model_of("qwen2").named_parameters()}
    one = replace(SMALL, masked_steps=1, unmasked_steps=0, learning_rate=0.01)
    trained = {}
    for decay in (0.0, 0.5):
        trained[decay] = tiny.model_of("qwen2")
        recover(trained[decay], {}, random_tokens(), replace(one, weight_decay=decay), tmp_path / str(decay))
    for (name, without), shrunk in zip(
        trained[0.0].named_parameters(), trained[0.5].parameters(), strict=True
    ):
        if "norm" in name or "bias" in name:
            assert torch.equal(without, shrunk)
        else:
            torch.testing.assert_close(without - shrunk, 0.01 * 0.5 * start[name], rtol=1e-3, atol=1e-7)


def test_the_loss_of_a_text_that_can_be_learnt_falls(tmp_path):
    model = tiny.model_of("llama", initializer_range=0.02)
    start, step = torch.arange(12), torch.tensor([1, 2, 3] * 4)
    tokens = 3 + (start[:, None] + step[:, None] * torch.arange(16)) % 12
    settings = replace(
        SMALL,
        masked_steps=50,
        unmasked_steps=10,
        batch=12,
        micro_batch=12,
        checkpoint_every=100,
        learning_rate=1e-2,
    )
    found = recover(model, half_of(model), tokens, settings, tmp_path / "r")
    assert found.losses[0] > 4  # ln 101 = 4.6
    assert found.losses[-1] < 1
    assert found.masked == 50


def test_sequences_are_taken_in_an_order_of_the_seeds_each_once_before_any_comes_again(tmp_path):
    tokens = random_tokens(10)
    orders = []
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        model, taken = tiny.model_of("llama"), []
        model.register_forward_pre_hook(lambda _, arguments, taken=taken: taken.extend(arguments[0].tolist()))
        recover(
            model, {}, tokens, replace(SMALL, seed=seed, masked_steps=4, unmasked_steps=1), tmp_path / folder
        )
        known = tokens[:, :-1].tolist()
        orders.append([known.index(row) for row in taken])
    assert orders[0] == orders[1] != orders[2]
    for order in orders:
        assert len(order) == 20
        assert sorted(order[:10]) == sorted(order[10:]) == list(range(10))
        assert order[:10] != order[10:]


# The rate.


def test_the_rate_by_hand():
    settings = replace(SMALL, masked_steps=30, unmasked_steps=10, learning_rate=0.2)
    rates = [settings.rate_at(step) for step in range(40)]
    assert rates[:2] == [0.1, 0.2]  # 5% of 40 steps rise
    assert rates[20] == pytest.approx(0.11)  # 19 of the 38 falling steps: half-way between 0.2 and 0.02
    assert rates[39] == pytest.approx(0.02)
    assert rates[1:] == sorted(rates[1:], reverse=True)


def test_the_rate_of_the_papers_steps():
    rates = [Recovery().rate_at(step) for step in range(500)]
    assert rates[0] == pytest.approx(1e-4 / 25)
    assert max(rates) == rates[24] == pytest.approx(1e-4)
    # 426 of 475 falling steps: the cosine of 0.896842 pi is -0.947944
    assert rates[450] == pytest.approx(1e-4 * (0.1 + 0.9 * (1 - 0.947944) / 2), rel=1e-5)
    assert rates[499] == pytest.approx(1e-5)


# What else of the model changes.


def test_a_weight_that_requires_no_gradient_is_pruned_but_not_trained(tmp_path):
    model = tiny.model_of("llama")
    weight = model.get_submodule(UP).weight.requires_grad_(False)
    expected = plain_loop.prune(weight, 0.5)
    recover(model, PRUNED, random_tokens(), SMALL, tmp_path / "r")
    assert torch.equal(weight, expected)


def test_tied_weights_stay_tied(tmp_path):
    model = tiny.model_of("llama", tie_word_embeddings=True)
    found = recover(model, half_of(model), random_tokens(), SMALL, tmp_path / "r")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    stored = AutoModelForCausalLM.from_pretrained(found.model)
    assert stored.lm_head.weight is stored.model.embed_tokens.weight
    assert_same_state(stored, model)


def test_there_is_no_dropout_and_the_callers_random_numbers_stay(tmp_path):
    results = []
    for folder, seed in (("a", 0), ("b", 1)):
        model = tiny.model_of("gpt2").train()  # its configuration has dropout
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        results.append(recover(model, {}, random_tokens(), SMALL, tmp_path / folder).losses)
        assert torch.equal(torch.get_rng_state(), before)
        assert not model.training
    assert results[0] == results[1]


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
def test_without_gradients_around_it_it_trains_all_the_same(around, tmp_path):
    expected, model = tiny.model_of("llama"), tiny.model_of("llama")
    losses = recover(expected, PRUNED, random_tokens(), SMALL, tmp_path / "a").losses
    with around():
        assert recover(model, PRUNED, random_tokens(), SMALL, tmp_path / "b").losses == losses
    assert_same_state(model, expected)


def test_a_weight_in_another_memory_order_is_kept(tmp_path):
    model = tiny.model_of("llama")
    up = model.get_submodule(UP)
    up.weight = torch.nn.Parameter(up.weight.detach().T.contiguous().T)
    recover(model, PRUNED, random_tokens(), SMALL, tmp_path / "r")
