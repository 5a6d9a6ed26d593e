"""Layers run one by one give, to the bit, what the whole model gives."""

from collections import UserDict
from collections.abc import Callable
from dataclasses import replace

import pytest
import tiny
import torch
import transformers
from torch import Tensor, nn

from dtm_fast.errors import ModelError
from dtm_fast.measure.forward import logits_before
from dtm_fast.model import Decoder, model_identity
from dtm_fast.model.stepping import has_plain_head, head_input_after, logits_after, record, record_calls

T = 12
PLAIN = [family for family in tiny.FAMILIES if family != "gemma2"]


def tokens_of(rows: int = 2, seed: int = 0) -> Tensor:
    return torch.randint(3, 99, (rows, T), generator=torch.Generator().manual_seed(seed))


def assert_untouched(model: nn.Module) -> None:
    for path, module in model.named_modules():
        assert "forward" not in vars(module), path
        assert not module._forward_hooks, path
        assert not module._forward_pre_hooks, path


@torch.no_grad()
def head_input_of(model, tokens: Tensor, first: int) -> Tensor:
    """What the head is handed in a pass of the model itself."""
    kept, seen = tokens.shape[1] - first + 1, []
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(input_ids=tokens, use_cache=False, logits_to_keep=kept)
    handle.remove()
    return seen[0][:, -kept:-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3])
def test_each_call_makes_of_a_state_the_next_one(family, rows, dtype):
    model = tiny.model_of(family).to(dtype)
    tokens = tokens_of(rows)
    calls, states = record(Decoder.of(model), tokens)
    assert [call.layer for call in calls] == list(Decoder.of(model).layers)
    assert len(states) == tiny.LAYERS + 1
    with torch.no_grad():
        for call, before, after in zip(calls, states, states[1:], strict=False):
            assert not torch.equal(before, after)
            assert torch.equal(call(before), after)


def test_the_last_state_gives_the_logits_of_the_model(family):
    model, tokens = tiny.model_of(family), tokens_of()
    calls, states = record(Decoder.of(model), tokens)
    for first in (1, 5, T - 1):
        found = logits_after(model, calls, tokens, states[-1], first)
        assert found.shape == (2, T - first, tiny.VOCABULARY)
        assert torch.equal(found, logits_before(model, tokens, first))


def test_another_last_state_gives_the_logits_of_another_model(family):
    model, other, tokens = tiny.model_of(family), tiny.model_of(family), tokens_of()
    with torch.no_grad():
        for parameter in Decoder.of(other).layers[-1].parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    calls, _ = record(Decoder.of(model), tokens)
    _, states = record(Decoder.of(other), tokens)
    found = logits_after(model, calls, tokens, states[-1], 5)
    assert torch.equal(found, logits_before(other, tokens, 5))
    assert not torch.equal(found, logits_before(model, tokens, 5))


@pytest.mark.parametrize("family", PLAIN)
def test_the_input_of_the_head_is_what_the_model_multiplies(family):
    model, tokens = tiny.model_of(family), tokens_of()
    calls, states = record(Decoder.of(model), tokens)
    for first in (1, 5, T - 1):
        found = head_input_after(model, calls, tokens, states[-1], first)
        assert torch.equal(found, head_input_of(model, tokens, first))
        with torch.no_grad():
            logits = model.get_output_embeddings()(found)
        # The product of fewer rows may sum in another order: two steps of float32 for logits up to 8, each way.
        torch.testing.assert_close(logits, logits_before(model, tokens, first), rtol=0, atol=4 * 2.0**-21)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_that_only_multiplies_is_plain_however_many_rows_there_are(family, dtype):
    model = tiny.model_of(family).to(dtype)
    for rows in (1, 2, 3, 4, 16):
        tokens = tokens_of(rows)
        calls, states = record(Decoder.of(model), tokens)
        plain = has_plain_head(model, calls, tokens, states[-1])
        assert plain == (family in PLAIN), rows  # Gemma 2's has a soft cap


def halved(model, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = model.forward

    def forward(**arguments):
        output = plain(**arguments)
        output.logits /= 2
        return output

    monkeypatch.setattr(model, "forward", forward)


def with_bias(model, _: object) -> None:
    model.lm_head = nn.Linear(32, tiny.VOCABULARY)
    nn.init.zeros_(model.lm_head.bias)


def of_another_class(model, _: object) -> None:
    model.lm_head.__class__ = type("Int8Linear", (nn.Linear,), {})


def with_a_hook(model, _: object) -> None:
    model.lm_head.register_forward_hook(lambda module, args, output: output + 1)


def with_a_hook_before(model, _: object) -> None:
    model.lm_head.register_forward_pre_hook(lambda module, args: (args[0] + 0.3,))


def with_its_own_forward(model, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = model.lm_head.forward
    monkeypatch.setattr(model.lm_head, "forward", lambda x: plain(x).tanh())


@pytest.mark.parametrize(
    "change", [halved, with_bias, of_another_class, with_a_hook, with_a_hook_before, with_its_own_forward]
)
def test_a_head_that_does_more_is_not_plain(llama, change, monkeypatch):
    change(llama, monkeypatch)
    tokens = tokens_of()
    calls, states = record(Decoder.of(llama), tokens)
    assert not has_plain_head(llama, calls, tokens, states[-1])


def test_the_model_is_afterwards_as_it_was(family):
    model, tokens = tiny.model_of(family), tokens_of()
    identity, logits = model_identity(model), logits_before(model, tokens, 1)
    calls, states = record(Decoder.of(model), tokens)
    logits_after(model, calls, tokens, states[-1], 3)
    head_input_after(model, calls, tokens, states[-1], 3)
    has_plain_head(model, calls, tokens, states[-1])
    assert_untouched(model)
    assert model_identity(model) == identity
    assert torch.equal(logits_before(model, tokens, 1), logits)


@pytest.mark.parametrize("where", ["model.layers.1.mlp", "model.norm", "lm_head"])
def test_the_model_is_as_it_was_after_an_exception_inside(llama, where):
    decoder, tokens = Decoder.of(llama), tokens_of()
    calls, states = record(decoder, tokens)

    def fail(*_: object) -> None:
        raise RuntimeError("inside")

    handle = llama.get_submodule(where).register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="inside"):
        record(decoder, tokens)
    if "layers" not in where:
        for run in (logits_after, head_input_after):
            with pytest.raises(RuntimeError, match="inside"):
                run(llama, calls, tokens, states[-1], 3)
    if where == "model.norm":  # a head with hooks is not tried
        with pytest.raises(RuntimeError, match="inside"):
            has_plain_head(llama, calls, tokens, states[-1])
    handle.remove()
    assert_untouched(llama)


def test_a_forward_of_the_layers_own_is_put_back(llama):
    decoder, tokens = Decoder.of(llama), tokens_of()
    plain = decoder.layers[1].forward
    decoder.layers[1].forward = own = lambda *args, **kwargs: 2 * plain(*args, **kwargs)
    calls, states = record(decoder, tokens)
    logits = logits_after(llama, calls, tokens, states[-1], 3)
    assert vars(decoder.layers[1])["forward"] is own
    assert torch.equal(logits, logits_before(llama, tokens, 3))


class Around(nn.Module):
    """Hands hidden states to a layer, and takes them out of what it returns, in another way than Llama."""

    def __init__(self, layer: nn.Module, by_keyword: bool, in_a_tuple: bool) -> None:
        super().__init__()
        self.layer, self.by_keyword, self.in_a_tuple = layer, by_keyword, in_a_tuple

    def forward(self, hidden: Tensor, **kwargs: object) -> Tensor:
        output = (
            self.layer(hidden_states=hidden, **kwargs) if self.by_keyword else self.layer(hidden, **kwargs)
        )
        return output[0] if self.in_a_tuple else output


@pytest.mark.parametrize("by_keyword", [False, True])
@pytest.mark.parametrize("in_a_tuple", [False, True])
def test_layers_are_called_and_answer_as_they_are_used_to(llama, by_keyword, in_a_tuple):
    decoder, tokens = Decoder.of(llama), tokens_of()
    logits, (_, expected) = logits_before(llama, tokens, 3), record(decoder, tokens)
    for index, layer in enumerate(decoder.layers):
        llama.model.layers[index] = Around(layer, by_keyword, in_a_tuple)
        if in_a_tuple:
            plain = layer.forward
            layer.forward = lambda *args, plain=plain, **kwargs: (plain(*args, **kwargs), None)
    calls, states = record(decoder, tokens)
    assert all(torch.equal(*each) for each in zip(states, expected, strict=True))
    assert {(call.by_keyword, call.more) for call in calls} == {(by_keyword, (None,) if in_a_tuple else None)}
    with torch.no_grad():
        assert all(torch.equal(c(s), after) for c, s, after in zip(calls, states, states[1:], strict=False))
    assert torch.equal(logits_after(llama, calls, tokens, states[-1], 3), logits)
    assert has_plain_head(llama, calls, tokens, states[-1])


def test_states_are_handed_over_in_order_as_they_arise(llama):
    decoder, seen = Decoder.of(llama), []
    calls = record_calls(decoder, tokens_of(), lambda layer, state: seen.append((layer, state)))
    _, states = record(decoder, tokens_of())
    assert [layer for layer, _ in seen] == list(range(tiny.LAYERS + 1))
    assert all(torch.equal(state, expected) for (_, state), expected in zip(seen, states, strict=True))
    assert [call.layer for call in calls] == list(decoder.layers)


@pytest.mark.parametrize("layer", [1, 2])
def test_layers_with_something_between_them_are_refused(llama, layer):
    decoder = Decoder.of(llama)
    handle = decoder.layers[layer].register_forward_pre_hook(lambda _, args: (args[0] + 1, *args[1:]))
    with pytest.raises(ModelError, match=f"what enters layer {layer} is not what left layer {layer - 1}"):
        record(decoder, tokens_of())
    handle.remove()
    assert_untouched(llama)


def test_a_layer_that_runs_twice_is_refused(llama, monkeypatch):
    layers = Decoder.of(llama).layers
    plain = layers[2].forward
    again = lambda hidden, **kwargs: plain(layers[1](hidden, **kwargs), **kwargs)  # noqa: E731
    monkeypatch.setattr(layers[2], "forward", again)
    with pytest.raises(ModelError, match="layer 1 runs"):
        record(Decoder.of(llama), tokens_of())


def test_one_module_as_two_layers_is_refused(llama):
    decoder = Decoder.of(llama)
    llama.model.layers[1] = llama.model.layers[0]
    with pytest.raises(ModelError, match="layer 1"):
        record(replace(decoder, layers=tuple(llama.model.layers)), tokens_of())


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_layer_that_does_not_run_is_refused(llama, layer):
    decoder = Decoder.of(llama)
    llama.model.layers = nn.ModuleList(each for i, each in enumerate(decoder.layers) if i != layer)
    llama.config.num_hidden_layers = 2
    with pytest.raises(ModelError, match=r"layer \d (runs as number|does not run)"):
        record(decoder, tokens_of())


def test_a_layer_that_returns_no_hidden_states_is_refused(llama):
    decoder = Decoder.of(llama)
    decoder.layers[0].forward = lambda hidden, **kwargs: {"hidden_states": hidden}
    with pytest.raises(ModelError, match="layer 0 is not handed, or does not return, hidden states"):
        record(decoder, tokens_of())


class Carrier(nn.Module):
    """Hands a layer, behind the hidden states, what the one before returned behind its own."""

    def __init__(self, layer: nn.Module, carried: list[object]) -> None:
        super().__init__()
        self.layer, self.carried = layer, carried

    def forward(self, hidden: Tensor, **kwargs: object) -> Tensor:
        output, self.carried[0] = self.layer(hidden, self.carried[0], **kwargs)
        return output


def carrying(model, returns: Callable[[Tensor, object], object], first: object = None) -> Decoder:
    """Each layer returns ``returns(hidden, what it was handed more)`` too, which the next one is handed."""
    decoder, carried = Decoder.of(model), [first]
    for index, layer in enumerate(decoder.layers):
        model.model.layers[index] = Carrier(layer, carried)
        layer.forward = lambda hidden, more, plain=layer.forward, **kwargs: (
            plain(hidden, **kwargs),
            returns(hidden, more),
        )
    return decoder


@pytest.mark.parametrize(
    "returns",
    [
        lambda hidden, more: hidden.mean(-1),
        lambda hidden, more: (None, [hidden + 1]),
        lambda hidden, more: UserDict(router=hidden * 2),
    ],
    ids=["tensor", "tuple", "mapping"],
)
def test_layers_that_hand_on_more_than_hidden_states_are_refused(llama, returns):
    decoder = carrying(llama, returns)
    with pytest.raises(ModelError) as error:
        record(decoder, tokens_of())
    assert str(error.value) == (
        "LlamaForCausalLM: layer 1 is handed more of layer 0 than its hidden states, so that its layers cannot be run "
        "one by one"
    )
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in decoder.layers)


def test_hidden_states_of_an_earlier_layer_are_more_than_those_of_the_last(llama):
    # What layer 0 passes on is the embedding, which stays as it is; layer 1 passes on what layer 0 made.
    decoder = carrying(llama, lambda hidden, more: hidden)
    with pytest.raises(ModelError, match="layer 2 is handed more of layer 0 than its hidden states"):
        record(decoder, tokens_of())


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x, None), lambda x: {"mask": x}])
def test_what_layers_pass_on_as_it_is_may_be_handed_to_all(llama, wrap):
    logits = logits_before(llama, tokens_of(), 3)
    decoder = carrying(llama, lambda hidden, more: more, wrap(torch.ones(3)))
    calls, states = record(decoder, tokens_of())
    with torch.no_grad():
        assert all(torch.equal(c(s), after) for c, s, after in zip(calls, states, states[1:], strict=False))
    assert torch.equal(logits_after(llama, calls, tokens_of(), states[-1], 3), logits)


def sharing(model, shared: object, act: Callable[[object, Tensor], None]) -> Decoder:
    """Each layer is handed ``shared``, and acts on it."""
    decoder = Decoder.of(model)
    for layer in decoder.layers:

        def forward(hidden: Tensor, plain=layer.forward, **kwargs: object) -> Tensor:
            act(kwargs.pop("shared"), hidden)
            return plain(hidden, **kwargs)

        layer.forward = forward
        layer.register_forward_pre_hook(
            lambda _, args, kwargs: (args, {**kwargs, "shared": shared}), with_kwargs=True
        )
    return decoder


@pytest.mark.parametrize(
    ("shared", "act"),
    [
        ({}, lambda shared, hidden: shared.update(full=hidden.sum())),
        (UserDict(), lambda shared, hidden: shared.update(full=(hidden + 1, None))),
        (UserDict(full=None), lambda shared, hidden: shared.update(full=hidden.sum())),
        ({"of": {"full": 3}}, lambda shared, hidden: shared["of"].update(full=hidden.sum())),
        ([], lambda shared, hidden: shared.append(hidden.sum())),
    ],
)
def test_what_layers_write_to_is_refused(llama, shared, act):
    with pytest.raises(ModelError) as error:
        record(sharing(llama, shared, act), tokens_of())
    assert str(error.value) == (
        "LlamaForCausalLM: what layer 0 is handed is written to while the model reads, so that its layers cannot be "
        "run one by one"
    )


@pytest.mark.parametrize("shared", [{"full": torch.ones(2)}, UserDict(full=(torch.ones(2), 3)), [], None])
def test_what_layers_only_read_may_be_shared(llama, shared):
    calls, states = record(sharing(llama, shared, lambda shared, hidden: None), tokens_of())
    with torch.no_grad():
        assert all(torch.equal(c(s), after) for c, s, after in zip(calls, states, states[1:], strict=False))


TINY = {"vocab_size": tiny.VOCABULARY, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
TINY |= {"head_dim": 8, "max_position_embeddings": 128, "initializer_range": 0.2}
GEMMA3N = {"vocab_size_per_layer_input": tiny.VOCABULARY, "hidden_size_per_layer_input": 8, "laurel_rank": 4}
GEMMA3N |= {"intermediate_size": 64, "num_hidden_layers": 4, "num_kv_shared_layers": 2, "sliding_window": 64}
GEMMA3N |= {"layer_types": ["sliding_attention", "full_attention"] * 2, "altup_num_inputs": 2}
GEMMA3N |= {"activation_sparsity_pattern": [0.0] * 4}
ZAYA = {"num_hidden_layers": 3, "moe_intermediate_size": 32, "num_experts": 4, "router_hidden_size": 16}


@pytest.mark.parametrize(
    ("configuration", "changes", "said"),
    [
        ("Gemma3nTextConfig", GEMMA3N, "what layer 0 is handed is written to"),
        ("ZayaConfig", ZAYA, "layer 1 is handed more of layer 0 than its hidden states"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*more than two dimensions")
def test_families_whose_layers_hand_on_more_are_refused(configuration, changes, said):
    if not hasattr(transformers, configuration):
        pytest.skip(f"this transformers has no {configuration}")
    config = getattr(transformers, configuration)(**TINY, **changes)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with pytest.raises(ModelError, match=f"{said}.*cannot be run one by one"):
        record(Decoder.of(model), tokens_of())
