"""Exported folders back on this package's kernels, and folders that are refused."""

import copy
import json
from pathlib import Path

import pytest
import tiny
import torch
from made_export import ATTENTION, GATED, MIXED, WITH_DROP, Exported, model_in
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

import dtm_fast as dtm
from dtm_fast import nn
from dtm_fast.compression import W8A8, Change, Configuration, Int8, Prune
from dtm_fast.errors import ModelError
from dtm_fast.export import load_export, loading
from dtm_fast.measure import ReferenceEvaluator
from dtm_fast.model import Decoder, model_identity

TOKENS = torch.arange(3, 67).view(2, 32)
W8A8_SETS: Configuration = {
    path.format(layer): W8A8() for path in (*ATTENTION, *GATED) for layer in range(tiny.LAYERS)
}


@pytest.fixture(autouse=True)
def sparse_below_half(monkeypatch: pytest.MonkeyPatch) -> None:
    """The measured rule finds nothing in a tiny model large enough, and differs between instruction sets."""

    def faster_layer(weight: torch.Tensor):
        return (
            nn.SparseLinear if int(weight.count_nonzero()) < weight.numel() / 2 else None
        ), "as the test has it"

    monkeypatch.setattr(loading, "faster_layer", faster_layer)


@torch.no_grad()
def logits(model: PreTrainedModel, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    return model(input_ids=tokens, use_cache=False).logits


def on_kernels(exported: Exported) -> PreTrainedModel:
    """The base with the plan put in by hand: int8 layers made of its own linears, sparse ones below half."""
    model = copy.deepcopy(exported.model)
    decoder = Decoder.of(model)
    for path, treatment in exported.configuration.items():
        component = decoder.component(path)
        if type(treatment) is W8A8:
            model.set_submodule(path, nn.Int8Linear.from_linear(component.module))
            continue
        component.parameter.data = treatment.compress(component.weight)
        if treatment == Prune(0.55):
            model.set_submodule(path, nn.SparseLinear.from_linear(component.module))
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_it_is_the_base_with_the_layers_in_place_to_the_bit(export, dtype, tied):
    exported = export(MIXED, model_in(dtype, tie_word_embeddings=tied))
    model, tokenizer = load_export(exported.folder)
    assert torch.equal(logits(model), logits(on_kernels(exported)))
    assert model.dtype == dtype
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert not any(module.training for module in model.modules())
    assert not hasattr(model.config, "quantization_config")
    text = tiny.text_of(30)
    assert tokenizer(text).input_ids == tiny.tokenizer_of_characters()(text).input_ids
    tokens = TOKENS[:1, :10]
    assert torch.equal(model.generate(tokens, max_new_tokens=4, do_sample=False)[:, :10], tokens)


def test_every_component_has_the_layer_of_its_form(export):
    model, _ = load_export(export(MIXED | WITH_DROP).folder)
    for path in dtm.components(tiny.model_of("llama")):
        treatment = (MIXED | WITH_DROP).get(path)
        sparse = treatment is not None and treatment.key in ("prune(0.55)", "drop")
        kind = nn.Int8Linear if type(treatment) is W8A8 else nn.SparseLinear if sparse else torch.nn.Linear
        assert type(model.get_submodule(path)) is kind, path


def test_the_int8_numbers_are_those_of_the_file(export):
    exported = export(W8A8_SETS)
    model, _ = load_export(exported.folder)
    tensors = exported.tensors
    for path in W8A8_SETS:
        layer = model.get_submodule(path)
        assert torch.equal(layer.weight, tensors[f"{path}.weight"])
        assert torch.equal(layer.weight_scale, tensors[f"{path}.weight_scale"])


def test_the_fdt_of_the_plan_is_measured_again(export, make_probes):
    exported = export(W8A8_SETS | {"model.layers.1.mlp.down_proj": Int8()})
    probes = make_probes(exported.model, count=8)
    planned = ReferenceEvaluator(exported.model, probes).measure([exported.configuration])[0]
    model, _ = load_export(exported.folder)
    found = ReferenceEvaluator(model, probes, base=exported.model).measure([{}])[0]
    assert planned.fdt.unique().numel() > 3
    assert found.fdt.tolist() == planned.fdt.tolist()
    assert found.sdt.tolist() == planned.sdt.tolist()


def test_without_int8_layers_and_sparse_ones_nothing_differs(export):
    configuration = {path: t for path, t in MIXED.items() if type(t) is not W8A8 and t != Prune(0.55)}
    exported = export(configuration)
    model, _ = load_export(exported.folder)
    with Change(Decoder.of(exported.model), configuration):
        assert torch.equal(logits(model), logits(exported.model))
        assert model_identity(model) == model_identity(exported.model)


@pytest.mark.parametrize("family", ["qwen2", "opt", "gpt_neox", "phi3"])
def test_layers_with_a_bias_and_other_families(export, family):
    model = tiny.model_of(family)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    paths = dtm.components(model)
    exported = export(dict.fromkeys(paths[1::2], W8A8()) | dict.fromkeys(paths[::4], Prune(0.55)), model)
    loaded, _ = load_export(exported.folder)
    assert torch.equal(logits(loaded), logits(on_kernels(exported)))


def test_gpt2_stays_dense_and_its_masks_are_checked(export):
    model = tiny.model_of("gpt2")
    exported = export(dict.fromkeys(dtm.components(model)[::2], Prune(0.7)), model)
    loaded, _ = load_export(exported.folder)
    with Change(Decoder.of(model), exported.configuration):
        assert torch.equal(logits(loaded), logits(model))


def test_another_dtype_is_taken_for_what_is_not_int8(export):
    exported = export(W8A8_SETS, model_in(torch.float16))
    with pytest.raises(ModelError, match=r"int8 layers take float32 and bfloat16, not torch.float16"):
        load_export(exported.folder)
    model, _ = load_export(exported.folder, torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert model.get_submodule(next(iter(W8A8_SETS))).weight.dtype == torch.int8
    assert logits(model).isfinite().all()


def test_the_generation_settings_come_along(export):
    llama = tiny.model_of("llama")
    llama.generation_config.max_new_tokens = 7
    model, _ = load_export(export(MIXED, llama).folder)
    assert model.generation_config.max_new_tokens == 7


# Other people's folders.


def as_others_write_it(exported: Exported) -> None:
    """One group for all linears but the head, scales in bfloat16, other fields, and no plan."""
    (exported.folder / "dtm_plan.json").unlink()
    exported.rewrite_tensors(
        lambda tensors: tensors.update(
            {name: tensor.bfloat16() for name, tensor in tensors.items() if name.endswith("_scale")}
        )
    )

    def change(config):
        stored = config["quantization_config"]
        stored["config_groups"]["group_0"] = stored["config_groups"].pop("group_00")
        group = stored["config_groups"]["group_0"]
        group |= {"targets": ["Linear"], "output_activations": None}
        group["weights"] |= {"actorder": None, "group_size": None, "observer": "minmax", "zp_dtype": None}
        group["input_activations"] |= {"block_structure": None, "observer": None}
        stored |= {"ignore": ["re:.*lm_head"], "kv_cache_scheme": None, "version": "0.12.2"}

    exported.rewrite_config(change)


def test_a_w8a8_folder_of_others_is_loaded_too(export):
    model = model_in(torch.bfloat16)
    exported = export(dict.fromkeys(dtm.components(model), W8A8()), model)
    as_others_write_it(exported)
    loaded, _ = load_export(exported.folder)
    expected = on_kernels(exported)
    for path in exported.configuration:
        assert type(loaded.get_submodule(path)) is nn.Int8Linear
        layer = expected.get_submodule(path)
        layer.weight_scale = layer.weight_scale.bfloat16().float()
    assert type(loaded.lm_head) is torch.nn.Linear
    assert torch.equal(logits(loaded), logits(expected))


@pytest.mark.parametrize(
    "change",
    [
        {"weights": {"num_bits": 4, "strategy": "group", "group_size": 16}},
        {"weights": {"strategy": "tensor"}},
        {"input_activations": {"strategy": "tensor", "dynamic": False}},
        {"input_activations": {"symmetric": False}},
        {"weights": {"type": "float"}},
    ],
    ids=str,
)
def test_schemes_without_a_kernel_are_refused(export, change):
    exported = export(dict.fromkeys(W8A8_SETS, W8A8()))
    as_others_write_it(exported)

    def put(config):
        for name, fields in change.items():
            config["quantization_config"]["config_groups"]["group_0"][name] |= fields

    exported.rewrite_config(put)
    with pytest.raises(ModelError, match=r"group_0: ") as refused:
        load_export(exported.folder)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["kv_cache_scheme", "transform_config"])
def test_what_else_a_config_can_do_is_refused(export, name):
    exported = export(W8A8_SETS)
    exported.rewrite_config(lambda config: config["quantization_config"].update({name: {"num_bits": 8}}))
    with pytest.raises(ModelError, match=f"{name}: does something else"):
        load_export(exported.folder)


# Damaged folders.

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
PACKED = "model.layers.1.mlp.gate_proj"


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def tamper_mask(exported: Exported) -> None:
    masks = load_file(exported.folder / "masks.safetensors")
    masks[f"{DOWN}.mask"][3, 1] ^= 0b100
    write_masks(exported, masks)


def write_masks(exported: Exported, masks: dict[str, torch.Tensor], version: str = "1") -> None:
    metadata = {"format": "dtm-bitmask", "version": version, "bitorder": "little"}
    save_file(masks, exported.folder / "masks.safetensors", metadata=metadata)


def other_masks(change) -> object:
    def damage(exported: Exported) -> None:
        masks = load_file(exported.folder / "masks.safetensors")
        change(masks)
        write_masks(exported, masks)

    return damage


def tensors(change) -> object:
    return lambda exported: exported.rewrite_tensors(change)


def config(change) -> object:
    return lambda exported: exported.rewrite_config(change)


def other_plan(path: str, key: str) -> object:
    def damage(exported: Exported) -> None:
        file = exported.folder / "dtm_plan.json"
        plan = json.loads(file.read_text())
        plan["configuration"][path] = key
        file.write_text(json.dumps(plan))

    return damage


DAMAGE = {
    "no config": (lambda e: (e.folder / "config.json").unlink(), "has no config.json"),
    "config is no json": (
        lambda e: (e.folder / "config.json").write_text("{"),
        "no usable model configuration",
    ),
    "weights truncated": (lambda e: cut(e.folder / "model.safetensors"), "damaged or truncated"),
    "weights missing": (lambda e: (e.folder / "model.safetensors").unlink(), "no model.safetensors"),
    "index damaged": (
        lambda e: (e.folder / "model.safetensors.index.json").write_text('{"weight_map": []}'),
        "index.json: cannot be read",
    ),
    "index points elsewhere": (
        lambda e: (e.folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../b"}}'),
        "no ../b",
    ),
    "generation config is no json": (
        lambda e: (e.folder / "generation_config.json").write_text("{"),
        "no usable generation_config.json",
    ),
    "generation config is no mapping": (
        lambda e: (e.folder / "generation_config.json").write_text("[]"),
        "no usable generation_config.json",
    ),
    "masks truncated": (lambda e: cut(e.folder / "masks.safetensors"), "damaged or truncated"),
    "masks missing": (lambda e: (e.folder / "masks.safetensors").unlink(), "has no mask"),
    "mask tampered": (
        tamper_mask,
        f"{DOWN}: its mask disagrees with the zeros of its weight in 1 of 32 rows",
    ),
    "mask of another shape": (
        other_masks(lambda masks: masks.update({f"{DOWN}.mask": masks[f"{DOWN}.mask"][:, 1:].clone()})),
        "its mask is torch.uint8 [32, 7], not uint8 [32, 8]",
    ),
    "mask of another version": (
        lambda e: write_masks(e, load_file(e.folder / "masks.safetensors"), "2"),
        "not the masks of dtm_fast",
    ),
    "a mask too many": (
        other_masks(lambda masks: masks.update({"model.norm.mask": torch.ones(1, 4, dtype=torch.uint8)})),
        "model.norm has a mask",
    ),
    "weight changed under its mask": (
        tensors(lambda t: t[f"{DOWN}.weight"].view(-1).__setitem__(slice(0, 2), torch.tensor([0.0, 9.0]))),
        "its mask disagrees",
    ),
    "int8 of another shape": (
        tensors(lambda t: t.update({f"{Q}.weight": t[f"{Q}.weight"][:, :-1].clone()})),
        f"{Q}: its weight is I8 [32, 31], not I8 [32, 32]",
    ),
    "int8 turned to floats": (
        tensors(lambda t: t.update({f"{Q}.weight": t[f"{Q}.weight"].float()})),
        f"{Q}: its weight is F32 [32, 32], not I8",
    ),
    "scale of another shape": (
        tensors(lambda t: t.update({f"{Q}.weight_scale": t[f"{Q}.weight_scale"].squeeze(1)})),
        f"{Q}: its weight_scale is [32], not [32, 1]",
    ),
    "scale missing": (
        tensors(lambda t: t.pop(f"{Q}.weight_scale")),
        f"{Q}: group_00 targets it, and it has no",
    ),
    "scale not finite": (
        tensors(lambda t: t[f"{Q}.weight_scale"].view(-1).__setitem__(2, torch.inf)),
        f"{Q}: its weight_scale holds values that are NaN or infinite",
    ),
    "packed of another shape": (
        tensors(lambda t: t[f"{PACKED}.weight_shape"].__setitem__(0, 32)),
        f"{PACKED}: its weight_shape says [32, 32], not [64, 32]",
    ),
    "dense of another shape": (
        tensors(lambda t: t.update({f"{DOWN}.weight": t[f"{DOWN}.weight"][1:].clone()})),
        f"{DOWN}: its weight is [31, 64], not [32, 64]",
    ),
    "dense missing": (tensors(lambda t: t.pop("model.norm.weight")), "1 missing keys"),
    "dense not finite": (
        tensors(lambda t: t["model.norm.weight"].__setitem__(1, torch.nan)),
        "model.norm.weight holds 1 values that are NaN or infinite",
    ),
    "group ignored": (
        config(lambda c: c["quantization_config"]["ignore"].append(Q)),
        f"{Q}: has weight_scale, and no config group targets it",
    ),
    "not compressed": (
        config(lambda c: c["quantization_config"].update(quantization_status="frozen")),
        "quantization_status is 'frozen', not 'compressed'",
    ),
    "config without quantization": (
        config(lambda c: c.pop("quantization_config")),
        f"{Q}: has weight_scale, and no config group targets it",
    ),
    "plan says dense": (
        other_plan(Q, "prune(0.5)"),
        f"{Q} is dense in dtm_plan.json and int-quantized in config",
    ),
    "plan says int8": (
        other_plan(DOWN, "int8"),
        f"{DOWN} is pack-quantized in dtm_plan.json and dense in config",
    ),
    "plan says pruned": (
        other_plan("model.layers.2.mlp.up_proj", "prune(0.5)"),
        "model.layers.2.mlp.up_proj has no mask",
    ),
    "no plan at all": (
        lambda e: (e.folder / "dtm_plan.json").write_text("[]"),
        "dtm_plan.json: ",
    ),
    "no tokenizer": (
        lambda e: [file.unlink() for file in e.folder.glob("token*")],
        "no usable tokenizer",
    ),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_folder_is_refused_in_one_line(copied, how):
    damage, expected = DAMAGE[how]
    exported = copied(MIXED)
    damage(exported)
    with pytest.raises(ModelError) as refused:
        load_export(exported.folder)
    assert expected in str(refused.value)
    assert str(exported.folder) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"none: the folder has no config\.json"):
        load_export(tmp_path / "none")


def test_a_narrower_dtype_may_round_what_a_mask_keeps(export):
    model = tiny.model_of("llama")
    with torch.no_grad():
        model.get_submodule(DOWN).weight[:, ::3] = 1e-9
    exported = export({DOWN: Prune(0.2)}, model)
    loaded, _ = load_export(exported.folder, torch.float16)
    assert not loaded.get_submodule(DOWN).weight[:, ::3].any()
    tamper_mask(exported)
    with pytest.raises(ModelError, match="its mask disagrees with the zeros of its weight in 1 of"):
        load_export(exported.folder)
