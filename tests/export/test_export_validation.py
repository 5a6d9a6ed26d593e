"""Every rule of the validator, with a folder that breaks it."""

import json

import pytest
import tiny
import torch
from made_export import ATTENTION, GATED, MIXED, Exported
from safetensors.torch import save_file

from dtm_fast.compression import W8A8, Int8, Prune
from dtm_fast.export import validate

pytestmark = pytest.mark.once

QKV = [path.format(0) for path in ATTENTION]
Q, K, V = QKV
UP = GATED[1].format(0)
W8A8_SET = dict.fromkeys(QKV, W8A8())


def stored(change):
    """``change`` gets the quantization_config."""
    return lambda exported: exported.rewrite_config(lambda config: change(config["quantization_config"]))


def group(change, key: str = "group_00"):
    return stored(lambda config: change(config["config_groups"][key]))


def tensors(change):
    return lambda exported: exported.rewrite_tensors(change)


def move_to_second_group(path: str, keep: bool = False, **fields):
    def change(config):
        first = config["config_groups"]["group_00"]
        if not keep:
            first["targets"].remove(path)
        config["config_groups"]["group_01"] = json.loads(json.dumps(first)) | {"targets": [path]}
        for name, value in fields.items():
            config["config_groups"]["group_01"][name] = value

    return stored(change)


def rename(old: str, new: str):
    def change(config):
        config["config_groups"] = {
            (new if key == old else key): value for key, value in config["config_groups"].items()
        }

    return stored(change)


def second_class_group(config):
    config["config_groups"]["group_01"] = json.loads(json.dumps(config["config_groups"]["group_00"]))
    config["config_groups"]["group_01"]["targets"] = ["Linear"]


def _without_inputs(fields):
    fields["input_activations"] = None


ONE_SCHEME = (
    "model.layers.0.self_attn.qkv_proj: vLLM multiplies by its parts as one matrix "
    "and needs one scheme for all: "
)

BROKEN = {
    # Fields.
    "quant_method": (stored(lambda c: c.update(quant_method="gptq")), "quant_method is 'gptq', not"),
    "format unknown": (stored(lambda c: c.update(format="int8")), "format 'int8' is none of dense, "),
    "format no text": (stored(lambda c: c.update(format=["x"])), "format ['x'] is none of"),
    "format missing": (stored(lambda c: c.pop("format")), "format None is none of"),
    "status": (
        stored(lambda c: c.pop("quantization_status")),
        "quantization_status is None, not 'compressed'",
    ),
    "no groups": (stored(lambda c: c.update(config_groups={})), "config_groups: there are none"),
    "no mapping": (
        lambda e: e.rewrite_config(lambda c: c.update(quantization_config={"quant_method": "x"})),
        "config_groups: there are none",
    ),
    "a preset": (
        stored(lambda c: c.update(config_groups={"W8A8": [*QKV]})),
        "W8A8: not a scheme with targets, weights and input_activations",
    ),
    "no targets": (group(lambda g: g.update(targets=[])), "group_00: not a scheme with targets"),
    "a pattern that is none": (
        group(lambda g: g.update(targets=["re:("])),
        "group_00: not a scheme with targets",
    ),
    "ignore that is none": (stored(lambda c: c.update(ignore="lm_head")), "ignore: not a list of names"),
    "order of the groups": (
        lambda e: (move_to_second_group(V)(e), rename("group_00", "group_9")(e)),
        "config_groups: group_9, group_01 are not in alphabetical order",
    ),
    "own format beside another": (
        group(lambda g: g.update(format="pack-quantized")),
        "group_00: its format pack-quantized is not that of the whole, int-quantized; two need mixed-precision",
    ),
    "mixed without an own format": (
        stored(lambda c: c.update(format="mixed-precision")),
        "group_00: has no format of its own, and that of the whole is mixed-precision",
    ),
    "sparsity_config": (
        stored(lambda c: c.update(sparsity_config={"format": "dense", "targets": [UP]})),
        "sparsity_config: has targets, which vLLM refuses",
    ),
    # Schemes.
    "weights alone are not int-quantized": (
        group(lambda g: g.update(input_activations=None)),
        "group_00: int-quantized needs input_activations; weights alone are pack-quantized",
    ),
    "weights alone are not naive-quantized": (
        lambda e: (stored(lambda c: c.update(format="naive-quantized"))(e), group(_without_inputs)(e)),
        "group_00: vLLM has no scheme for int weights alone in naive-quantized",
    ),
    "4 bits are not int-quantized": (
        group(lambda g: g["weights"].update(num_bits=4)),
        "group_00: int-quantized must be symmetric int8 weights",
    ),
    "no symmetric weights": (
        group(lambda g: g["weights"].update(symmetric=False)),
        "group_00: int-quantized must be symmetric int8 weights",
    ),
    "inputs per token that are static": (
        group(lambda g: g["input_activations"].update(dynamic=False)),
        "group_00: int-quantized must be symmetric int8 weights",
    ),
    "dynamic weights": (
        group(lambda g: g["weights"].update(dynamic=True)),
        "group_00: weights must be static",
    ),
    "no weights": (group(lambda g: g.update(weights=None)), "group_00: quantizes no weights"),
    "packed 3 bits": (
        lambda e: (
            stored(lambda c: c.update(format="pack-quantized"))(e),
            group(_without_inputs)(e),
            group(lambda g: g["weights"].update(num_bits=3))(e),
        ),
        "group_00: pack-quantized must be int4 or int8 weights per channel or group",
    ),
    # Names.
    "a target that is not there": (
        group(lambda g: g["targets"].append("model.layers.9.mlp.up_proj")),
        "group_00: its target 'model.layers.9.mlp.up_proj' is no linear module of the model",
    ),
    "a pattern that finds nothing": (
        group(lambda g: g["targets"].append("re:.*query")),
        "group_00: its target 're:.*query' is no linear module of the model",
    ),
    "a class that is not there": (
        group(lambda g: g["targets"].append("Conv1d")),
        "group_00: its target 'Conv1d' is no linear module of the model",
    ),
    "a module that is no linear": (
        group(lambda g: g["targets"].append("model.norm")),
        "group_00: its target 'model.norm' is no linear module of the model",
    ),
    "ignoring what is not there": (
        stored(lambda c: c["ignore"].append("model.layers.9.mlp.up_proj")),
        "ignore: 'model.layers.9.mlp.up_proj' is no module of the model",
    ),
    # What is fused.
    "half ignored": (
        lambda e: (stored(lambda c: c["ignore"].append(K))(e), group(lambda g: g["targets"].remove(K))(e)),
        ONE_SCHEME + "q_proj is in group_00, k_proj is ignored, v_proj is in group_00",
    ),
    "half targeted": (
        group(lambda g: g["targets"].remove(V)),
        ONE_SCHEME + "q_proj is in group_00, k_proj is in group_00, v_proj is not targeted",
    ),
    "two schemes": (
        move_to_second_group(
            V, weights={"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor"}
        ),
        ONE_SCHEME + "q_proj is in group_00, k_proj is in group_00, v_proj is in group_01",
    ),
    # Overlaps.
    "two groups name one module": (
        move_to_second_group(V, keep=True),
        f"{V}: targeted by group_00 and group_01; which of them counts",
    ),
    "a class beside names": (
        stored(second_class_group),
        f"{Q}: targeted by group_00 and group_01; which of them counts",
    ),
    # Tensors.
    "a target without tensors": (
        tensors(lambda t: t.pop(f"{K}.weight")),
        f"{K}: group_00 targets it, and it has no weight",
    ),
    "a target without a scale": (
        tensors(lambda t: t.pop(f"{K}.weight_scale")),
        f"{K}: group_00 targets it, and it has no weight_scale",
    ),
    "a target that is dense": (
        tensors(lambda t: t.update({f"{K}.weight": torch.ones(16, 32)})),
        f"{K}: its weight is F32 [16, 32], not I8 [16, 32]",
    ),
    "int8 of another shape": (
        tensors(lambda t: t.update({f"{K}.weight": t[f"{K}.weight"][1:].clone()})),
        f"{K}: its weight is I8 [15, 32], not I8 [16, 32]",
    ),
    "scale of another shape": (
        tensors(lambda t: t.update({f"{K}.weight_scale": t[f"{K}.weight_scale"].squeeze(1)})),
        f"{K}: its weight_scale is [16], not [16, 1]",
    ),
    "scale of another dtype": (
        tensors(lambda t: t.update({f"{K}.weight_scale": t[f"{K}.weight_scale"].double()})),
        f"{K}: its weight_scale is F64, not one of F32, BF16, F16",
    ),
    "a zero point that is not taken": (
        tensors(lambda t: t.update({f"{K}.weight_zero_point": torch.ones(16, 1, dtype=torch.int8)})),
        f"{K}: has a weight_zero_point, which vLLM does not take",
    ),
    "int8 that nothing targets": (
        tensors(lambda t: t.update({f"{UP}.weight": t[f"{UP}.weight"].to(torch.int8)})),
        f"{UP}: its weight is I8, and no config group targets it",
    ),
    "a scale that nothing targets": (
        tensors(lambda t: t.update({f"{UP}.weight_scale": torch.ones(64, 1)})),
        f"{UP}: has weight_scale, and no config group targets it",
    ),
    "dense of another shape": (
        tensors(lambda t: t.update({f"{UP}.weight": t[f"{UP}.weight"][1:].clone()})),
        f"{UP}: its weight is [63, 32], not [64, 32]",
    ),
    **{
        f"{name} {value!r}": (
            group(lambda g, name=name, value=value: g["weights"].update({name: value})),
            "not a scheme with targets, weights and input_activations",
        )
        for name, value in {"symmetric": [], "strategy": ["channel"], "type": [], "num_bits": "8"}.items()
    },
    # Files.
    "masks that would be taken for weights": (
        lambda e: save_file({"x": torch.ones(2)}, e.folder / "masks.safetensors"),
        "masks.safetensors: without a model.safetensors.index.json vLLM reads every safetensors file for weights",
    ),
    "truncated": (
        lambda e: (e.folder / "model.safetensors").write_bytes(b"\x08"),
        "model.safetensors: damaged or truncated",
    ),
    "no file of weights": (lambda e: (e.folder / "model.safetensors").unlink(), "the weights are not there"),
    "no config": (lambda e: (e.folder / "config.json").unlink(), "has no config.json"),
    "no causal model": (
        lambda e: e.rewrite_config(lambda c: c.update(architectures=["T5Model"])),
        "not a causal language model: T5Model",
    ),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_rule_is_named_with_its_reason(copied, how):
    damage, expected = BROKEN[how]
    exported = copied(W8A8_SET)
    assert validate(exported.folder) == exported.problems == []
    damage(exported)
    problems = validate(exported.folder)
    assert any(expected in problem for problem in problems), problems
    assert not any("\n" in problem for problem in problems)


def test_a_pattern_may_name_vllms_own_layers(copied):
    exported = copied(W8A8_SET)
    group(lambda fields: fields["targets"].append("re:.*\\.0\\..*qkv_proj"))(exported)
    assert validate(exported.folder) == []
    group(lambda fields: fields.update(targets=["model.layers.0.self_attn.qkv_proj"]))(exported)
    assert validate(exported.folder) == []
    group(lambda fields: fields.update(targets=["re:.*qkv_projection"]))(exported)
    assert any(
        "'re:.*qkv_projection' is no linear module" in problem for problem in validate(exported.folder)
    )


def test_one_group_for_the_class_is_as_others_write_it(copied):
    exported = copied(W8A8_SET)
    group(lambda fields: fields.update(targets=["Linear"]))(exported)
    assert validate(exported.folder) == []


def test_packed_weights_are_looked_into(copied):
    exported = copied(MIXED)
    path = GATED[0].format(1)
    assert validate(exported.folder) == []
    exported.rewrite_tensors(
        lambda t: t.update({f"{path}.weight_packed": t[f"{path}.weight_packed"][:, 1:].clone()})
    )
    assert validate(exported.folder) == [f"{path}: its weight_packed is I32 [64, 7], not I32 [64, 8]"]
    exported.rewrite_tensors(lambda t: t.pop(f"{path}.weight_packed"))
    assert validate(exported.folder) == [f"{path}: group_01 targets it, and it has no weight_packed"]


def test_groups_of_the_same_scheme_may_share_a_fused_layer(copied):
    exported = copied(W8A8_SET)
    move_to_second_group(V)(exported)
    assert validate(exported.folder) == []


def test_a_scheme_of_floats_is_left_to_others(copied):
    exported = copied(W8A8_SET)
    stored(lambda config: config.update(format="float-quantized"))(exported)
    for name in ("weights", "input_activations"):
        group(lambda fields, name=name: fields[name].update(type="float"))(exported)
    assert validate(exported.folder) == []


def test_a_dense_folder_has_no_problems(copied):
    exported = copied({"model.layers.0.mlp.up_proj": Prune(0.5)})
    assert validate(exported.folder) == []
    (exported.folder / "model.safetensors.index.json").unlink()
    assert len(validate(exported.folder)) == 1


def test_weights_that_are_missing_are_named(copied):
    exported = copied({"model.layers.0.mlp.up_proj": Prune(0.5), "model.layers.1.mlp.down_proj": Int8()})
    names = ("model.layers.0.mlp.down_proj.weight", "model.norm.weight")
    exported.rewrite_tensors(lambda tensors: [tensors.pop(name) for name in names])
    assert validate(exported.folder) == [f"2 weights are missing, first: {names[0]}"]


@pytest.mark.parametrize("family", ["gpt_neox", "gpt2"])  # another name of the head; a tied head
def test_weights_of_another_name_or_none_are_not_missing(export, family):
    assert validate(export({}, tiny.model_of(family)).folder) == []


def test_a_folder_that_is_not_there(tmp_path):
    assert validate(tmp_path / "none") == [
        f"{tmp_path / 'none'}: the folder has no config.json that can be read, so it is no Hugging Face model"
    ]


def test_problems_of_several_kinds_are_all_named(copied):
    exported: Exported = copied(W8A8_SET)
    BROKEN["status"][0](exported)
    BROKEN["half targeted"][0](exported)
    BROKEN["scale of another dtype"][0](exported)
    assert len(validate(exported.folder)) == 4  # v's scale is left over as well
