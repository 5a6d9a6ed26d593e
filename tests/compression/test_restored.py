"""An accelerated model stays a model, and becomes what it was."""

import copy
import gc
import pickle
import weakref
from types import SimpleNamespace

import pytest
import tiny
import torch
from acceleration import (
    FAMILIES,
    MIXED,
    UP,
    error,
    everywhere,
    layers_of,
    logits,
    unchanged,
    with_hook,
)

import dtm_fast as dtm
from dtm_fast import nn
from dtm_fast.compression import (
    GPTQ,
    W8A8,
    Int4,
    Int8,
    LLMInt8,
    Prune,
)
from dtm_fast.compression.accelerated import accelerate, restore
from dtm_fast.errors import ComponentError, InputError, ModelError, TreatmentError
from dtm_fast.model import model_identity
from dtm_fast.plan import Plan

# The model stays one.


def test_a_state_goes_into_another_model_of_the_same_plan(sparse_pays: None, model) -> None:
    other = tiny.model_of(model.config.model_type, seed=1)
    for each in (model, other):
        accelerate(each, everywhere(each, *MIXED))
    assert not torch.equal(logits(other), logits(model))
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), logits(model))


@pytest.mark.parametrize(
    "copy_of", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))], ids=["deepcopy", "pickle"]
)
def test_a_copy_is_accelerated_and_can_be_restored_alone(sparse_pays: None, llama, copy_of) -> None:
    before = model_identity(llama)
    accelerate(llama, everywhere(llama, *MIXED))
    found = logits(llama)
    other = copy_of(llama)
    assert torch.equal(logits(other), found)
    restore(other)
    assert model_identity(other) == before
    assert not {p.data_ptr() for p in other.parameters()} & {p.data_ptr() for p in llama.parameters()}
    assert torch.equal(logits(llama), found)
    restore(llama)
    assert model_identity(llama) == before


def test_originals_are_not_on_the_tree(sparse_pays: None, model) -> None:
    paths = dtm.components(model)
    before = {id(each) for each in model.modules()}, {id(each) for each in model.parameters()}
    originals = layers_of(model, paths)
    own = {id(each) for original in originals for each in original.parameters()}
    embeddings = model.get_input_embeddings().weight
    accelerate(model, everywhere(model, *MIXED))
    assert not {id(each) for each in model.modules()} & {id(each) for each in originals}
    assert not {id(each) for each in model.parameters()} & own
    storages = {each.data_ptr() for original in originals for each in original.parameters()}
    assert not {value.data_ptr() for value in model.state_dict().values()} & storages
    assert model.get_input_embeddings().weight is embeddings
    restore(model)
    assert ({id(each) for each in model.modules()}, {id(each) for each in model.parameters()}) == before


@pytest.mark.parametrize("family", FAMILIES)
def test_tied_embeddings_stay_tied(family: str) -> None:
    model = tiny.model_of(family, tie_word_embeddings=True)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    accelerate(model, everywhere(model, *MIXED))
    assert model.lm_head.weight is model.get_input_embeddings().weight
    restore(model)
    assert model.lm_head.weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("training", [False, True])
def test_layers_take_the_mode_and_originals_follow_it(llama, training: bool) -> None:
    llama.train(training)
    configuration = everywhere(llama, *MIXED)
    accelerate(llama, configuration)
    assert {each.training for path in configuration for each in llama.get_submodule(path).modules()} == {
        training
    }
    llama.train(not training)
    restore(llama)
    assert {each.training for each in llama.modules()} == {not training}


# And out again.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_restoring_gives_the_same_modules_with_the_same_parameters(
    sparse_pays: None, model, dtype: torch.dtype
) -> None:
    model.to(dtype)
    before, names = model_identity(model), [name for name, _ in model.named_modules()]
    modules, storages = list(model.modules()), [each.data_ptr() for each in model.parameters()]
    found = logits(model)
    accelerate(model, everywhere(model, *MIXED))
    assert not torch.equal(logits(model), found)
    for _ in range(2):
        restore(model)
        assert [name for name, _ in model.named_modules()] == names
        assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
        assert [each.data_ptr() for each in model.parameters()] == storages
    assert model_identity(model) == before
    assert torch.equal(logits(model), found)
    assert not [name for name in vars(model) if "dtm_fast" in name]


def test_it_can_be_accelerated_again_but_not_twice(llama) -> None:
    accelerate(llama, everywhere(llama, Int8()))
    before = model_identity(llama)
    for plan in ({UP: W8A8()}, None):
        with pytest.raises(
            ModelError, match=r"^accelerate: the model is accelerated already: dtm_fast\.restore"
        ):
            accelerate(llama, plan)
    assert model_identity(llama) == before
    restore(llama)
    accelerate(llama, {UP: W8A8()})
    assert type(llama.get_submodule(UP)) is nn.Int8Linear


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_cast_meanwhile_comes_back_cast(sparse_pays: None, model, dtype: torch.dtype) -> None:
    expected = model_identity(copy.deepcopy(model).to(dtype))
    accelerate(model, everywhere(model, *MIXED))
    model.to(dtype)
    restore(model)
    assert model_identity(model) == expected


def test_an_accelerated_model_that_is_cast_computes_in_the_new_dtype(sparse_pays: None, model) -> None:
    accelerate(model, everywhere(model, *MIXED))
    found = logits(model)
    model.to(torch.bfloat16)
    assert logits(model).dtype == torch.bfloat16
    assert error(logits(model), found) < 0.1


def test_what_is_moved_meanwhile_comes_back_where_the_model_is(llama) -> None:
    accelerate(llama, everywhere(llama, *MIXED))
    llama.to("meta")
    restore(llama)
    assert {each.device.type for each in llama.parameters()} == {"meta"}


def test_without_the_originals_there_is_no_way_back(llama) -> None:
    gone = [weakref.ref(each) for each in layers_of(llama, dtm.components(llama))]
    accelerate(llama, everywhere(llama, *MIXED), keep_original=False)
    gc.collect()
    assert [each() for each in gone] == [None] * len(gone)
    found = logits(llama)
    with pytest.raises(
        ModelError, match=r"^restore: the original modules were not kept .* load the model anew$"
    ):
        restore(llama)
    with pytest.raises(ModelError, match="accelerated already"):
        accelerate(llama)
    assert torch.equal(logits(llama), found)


def test_a_layer_that_was_replaced_by_someone_else_is_not_overwritten(llama) -> None:
    accelerate(llama, everywhere(llama, *MIXED))
    llama.model.layers[1].mlp.up_proj = torch.nn.Identity()
    with pytest.raises(ModelError, match=rf"^restore: at {UP} is not the layer that accelerate put there$"):
        restore(llama)
    assert not isinstance(llama.model.layers[0].self_attn.q_proj, torch.nn.Linear)


# What is refused, before anything is swapped.


def with_subclass(model) -> None:
    class Special(torch.nn.Linear):
        pass

    model.get_submodule(UP).__class__ = Special


def with_shared_weight(model) -> None:
    up = model.get_submodule(UP)
    model.twin = torch.nn.Linear(up.in_features, up.out_features, bias=False)
    model.twin.weight = up.weight


def with_backward_hook(model) -> None:
    model.get_submodule(UP).register_full_backward_hook(lambda module, gradient, output: None)


def with_nan(model) -> None:
    model.get_submodule(UP).weight.data[0, 0] = torch.nan


@pytest.mark.parametrize(
    ("change", "plan", "options", "kind", "complaint"),
    [
        (None, {"model.layers.9.mlp.up_proj": Int8()}, {}, ComponentError, "has no component"),
        (None, {UP: "int8"}, {}, TreatmentError, "not a treatment"),
        (None, "int8", {}, TreatmentError, "maps components to treatments"),
        (None, {UP: Int4(7)}, {}, TreatmentError, UP),
        (None, {UP: GPTQ(16)}, {}, TreatmentError, "calibration"),
        (None, Plan({UP: Int8()}, "in order", {}, model="0" * 64), {}, InputError, "made for another model"),
        (None, {UP: W8A8()}, {"trainable": True}, TreatmentError, "w8a8 rounds its input"),
        (with_hook, {UP: Int8()}, {}, ModelError, f"{UP} cannot be replaced: it has hooks"),
        (with_backward_hook, {UP: Int8()}, {}, ModelError, f"{UP} cannot be replaced: it has hooks"),
        (with_subclass, {UP: Int8()}, {}, ModelError, f"{UP} cannot be replaced: its Special may do more"),
        (with_shared_weight, {UP: Int8()}, {}, ModelError, f"{UP} cannot be replaced: its weight is another"),
        (with_nan, {UP: Int8()}, {}, TreatmentError, f"{UP}: .*finite"),
        (with_nan, {UP: W8A8()}, {}, TreatmentError, f"{UP}: .*finite"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line_and_nothing_is_swapped(
    llama, change, plan, options, kind, complaint
) -> None:
    if change is not None:
        change(llama)
    if isinstance(plan, dict):
        plan = {dtm.components(llama)[0]: Prune(0.5), **plan}  # this one would fit
    before = unchanged(llama)
    with pytest.raises(kind, match=complaint) as raised:
        accelerate(llama, plan, **options)
    assert "\n" not in str(raised.value)
    assert unchanged(llama) == before
    restore(llama)
    assert unchanged(llama) == before


def test_an_interrupted_swap_is_undone(llama, monkeypatch: pytest.MonkeyPatch) -> None:
    before = unchanged(llama)
    put_in, count = torch.nn.Module.__setattr__, 0

    def interrupted(self, name, value):
        nonlocal count
        count += isinstance(value, nn.Int8Linear)
        if count == 5:
            count += 1
            raise KeyboardInterrupt
        put_in(self, name, value)

    monkeypatch.setattr(torch.nn.Module, "__setattr__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        accelerate(llama, everywhere(llama, W8A8()))
    monkeypatch.undo()
    assert unchanged(llama) == before


def test_a_plan_is_for_its_own_model_and_its_configuration_for_any(llama) -> None:
    plan = Plan({UP: W8A8()}, "in order", {}, model=model_identity(llama))
    accelerate(llama, plan)
    assert type(llama.get_submodule(UP)) is nn.Int8Linear
    restore(llama)
    other = tiny.model_of(seed=1)
    for each in (plan.configuration, SimpleNamespace(configuration=plan.configuration)):
        accelerate(other, each)
        assert type(other.get_submodule(UP)) is nn.Int8Linear
        restore(other)


def test_a_layer_that_is_no_more_in_the_model_is_not_taken_for_restored(llama) -> None:
    accelerate(llama, {UP: W8A8()})
    at = int(UP.split(".")[2])
    llama.model.layers[at] = copy.deepcopy(llama.model.layers[at])
    with pytest.raises(ModelError, match=f"at {UP} is not the layer that accelerate put there"):
        restore(llama)


def test_what_treats_inputs_otherwise_is_another_model() -> None:
    models = [tiny.model_of("llama") for _ in range(2)]
    for model, threshold in zip(models, (6.0, 0.05), strict=True):
        accelerate(model, {UP: LLMInt8(threshold)})
    assert model_identity(models[0]) != model_identity(models[1])
