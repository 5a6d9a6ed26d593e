"""What an exported folder holds, and what is refused before there is one."""

import json
import os
import stat

import numpy as np
import pytest
import tiny
import torch
from compressed_tensors.quantization import QuantizationConfig
from made_export import ATTENTION, GATED, MIXED, WITH_DROP, model_in, plan_for
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import dtm_fast as dtm
from dtm_fast.compression import GPTQ, W8A8, Drop, Int8, LLMInt8, Prune, SparseGPT
from dtm_fast.errors import InputError, ModelError, RunError, TreatmentError
from dtm_fast.export import export_checkpoint, load_export
from dtm_fast.model import Calibration, Decoder, model_identity
from dtm_fast.plan import Plan

QKV = [path.format(0) for path in ATTENTION]


def test_the_config_names_every_module_of_a_w8a8_plan(export):
    exported = export(dict.fromkeys(QKV, W8A8()))
    assert exported.problems == []
    others = [path for path in dtm.components(exported.model) if path not in QKV]
    assert exported.config["quantization_config"] == {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": [*others, "lm_head"],
        "config_groups": {
            "group_00": {
                "targets": QKV,
                "weights": {
                    "num_bits": 8,
                    "type": "int",
                    "symmetric": True,
                    "strategy": "channel",
                    "dynamic": False,
                },
                "input_activations": {
                    "num_bits": 8,
                    "type": "int",
                    "symmetric": True,
                    "strategy": "token",
                    "dynamic": True,
                },
            }
        },
    }


def test_two_forms_are_mixed_precision_and_each_group_has_its_own(export):
    config = export().config["quantization_config"]
    assert config["format"] == "mixed-precision"
    groups = config["config_groups"]
    assert list(groups) == ["group_00", "group_01"] == sorted(groups)
    assert [group["format"] for group in groups.values()] == ["int-quantized", "pack-quantized"]
    assert groups["group_00"]["targets"] == [*QKV, "model.layers.2.mlp.down_proj"]
    assert groups["group_01"]["targets"] == [path.format(1) for path in GATED]
    assert groups["group_01"]["input_activations"] is None
    QuantizationConfig.model_validate(config)


def test_every_config_is_one_that_compressed_tensors_reads_and_has_no_sparsity(export):
    config = export(MIXED | WITH_DROP).config
    assert "sparsity" not in json.dumps(config)
    read = QuantizationConfig.model_validate(config["quantization_config"])
    assert {group.weights.num_bits for group in read.config_groups.values()} == {8}


def test_int8_numbers_are_absmax_over_127_rounded(export):
    exported = export()
    tensors, path = exported.tensors, QKV[1]
    weight = exported.model.get_submodule(path).weight.detach().double().numpy()
    scale = np.abs(weight).max(axis=1, keepdims=True) / 127
    assert tensors[f"{path}.weight"].dtype == torch.int8
    assert tensors[f"{path}.weight_scale"].dtype == torch.float32
    assert list(tensors[f"{path}.weight_scale"].shape) == [weight.shape[0], 1]
    assert np.array_equal(tensors[f"{path}.weight"].numpy(), np.rint(weight / scale).astype(np.int8))
    assert np.allclose(tensors[f"{path}.weight_scale"].numpy(), scale, rtol=2**-23)
    packed = GATED[0].format(1)
    weight = exported.model.get_submodule(packed).weight.detach().double().numpy()
    scale = np.abs(weight).max(axis=1, keepdims=True) / 127
    bytes_ = tensors[f"{packed}.weight_packed"].numpy().astype("<i4").tobytes()
    expected = (np.rint(weight / scale) + 128).astype(np.uint8)
    assert np.array_equal(np.frombuffer(bytes_, np.uint8).reshape(expected.shape), expected)
    assert tensors[f"{packed}.weight_shape"].tolist() == list(weight.shape)
    assert f"{packed}.weight" not in tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_that_is_not_int8_is_dense_in_the_models_dtype(export, dtype):
    exported = export(MIXED | WITH_DROP, model_in(dtype))
    assert exported.config["dtype"] == str(dtype).removeprefix("torch.")
    tensors, base = exported.tensors, exported.model.state_dict()
    quantized = [p for p, t in exported.configuration.items() if type(t) in (W8A8, Int8)]
    dense = {name: tensor for name, tensor in tensors.items() if not name.startswith(tuple(quantized))}
    assert {tensor.dtype for tensor in dense.values()} == {dtype}
    assert dense.keys() == {name for name in base if not name.startswith(tuple(quantized))}
    for name, tensor in dense.items():
        treatment = exported.configuration.get(name.removesuffix(".weight"))
        expected = base[name] if treatment is None else treatment.compress(base[name])
        assert torch.equal(tensor, expected), name


def test_masks_are_bits_with_the_lowest_first(export):
    exported = export(MIXED | WITH_DROP)
    pruned = {
        "model.layers.0.self_attn.o_proj": Prune(0.2),
        "model.layers.1.mlp.down_proj": Prune(0.55),
        "model.layers.2.self_attn.o_proj": Drop(),
    }
    with safe_open(exported.folder / "masks.safetensors", "np") as stored:
        assert stored.metadata() == {"format": "dtm-bitmask", "version": "1", "bitorder": "little"}
        masks = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    assert masks.keys() == {f"{path}.mask" for path in pruned}
    for path, treatment in pruned.items():
        weight = treatment.compress(exported.model.get_submodule(path).weight.detach())
        expected = np.packbits(weight.numpy() != 0, axis=1, bitorder="little")
        assert masks[f"{path}.mask"].dtype == np.uint8
        assert np.array_equal(masks[f"{path}.mask"], expected)


def test_masks_of_rows_that_fill_no_byte(export):
    model = tiny.model_of("llama", hidden_size=36)
    exported = export({"model.layers.1.mlp.up_proj": Prune(0.5)}, model)
    with safe_open(exported.folder / "masks.safetensors", "np") as stored:
        mask = stored.get_tensor("model.layers.1.mlp.up_proj.mask")
    assert mask.shape == (64, 5)
    assert not (mask[:, 4] & 0b11110000).any()


def test_an_index_keeps_the_masks_from_being_taken_for_weights(export):
    exported = export({"model.layers.1.mlp.up_proj": Prune(0.5)})
    index = json.loads((exported.folder / "model.safetensors.index.json").read_text())
    tensors = exported.tensors
    assert index["weight_map"] == dict.fromkeys(tensors, "model.safetensors")
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert "quantization_config" not in exported.config


def test_tied_embeddings_stay_tied(export):
    exported = export(model=tiny.model_of("llama", tie_word_embeddings=True))
    assert "lm_head.weight" not in exported.tensors
    assert "model.embed_tokens.weight" in exported.tensors
    assert exported.config["tie_word_embeddings"] is True
    assert "lm_head" in exported.config["quantization_config"]["ignore"]


def test_the_plan_goes_in_and_the_model_stays_as_it_was(export):
    model = tiny.model_of("llama").train()
    before, grads = model_identity(model), {n: p.requires_grad for n, p in model.named_parameters()}
    exported = export(MIXED, model)
    assert Plan.read(exported.folder / "dtm_plan.json") == plan_for(model, MIXED)
    assert model_identity(model) == before
    assert model.training
    assert {n: p.requires_grad for n, p in model.named_parameters()} == grads
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert not hasattr(model.config, "quantization_config")


def test_an_empty_plan_is_the_model_itself(export):
    exported = export({})
    assert exported.problems == []
    assert exported.tensors.keys() == exported.model.state_dict().keys()
    assert "quantization_config" not in exported.config


def test_what_was_calibrated_is_written_as_it_was_measured(export):
    model = tiny.model_of("llama")
    tokens = torch.randint(3, tiny.VOCABULARY, (8, 40), generator=torch.Generator().manual_seed(0))
    calibration = Calibration.collect(model, tokens, cache=False)
    configuration = {
        "model.layers.1.mlp.up_proj": GPTQ(16),
        "model.layers.1.self_attn.o_proj": SparseGPT(0.5),
    }
    exported = export(configuration, model, calibration=calibration)
    decoder = Decoder.of(model, calibration)
    for path, treatment in configuration.items():
        component = decoder.component(path)
        expected = treatment.compress(component.weight, component.inputs)
        assert torch.equal(exported.tensors[f"{path}.weight"], expected)
    with safe_open(exported.folder / "masks.safetensors", "pt") as stored:
        assert list(stored.keys()) == ["model.layers.1.self_attn.o_proj.mask"]


def test_a_plan_is_exported_with_the_calibration_that_it_was_measured_with(llama, tmp_path):
    draw = torch.Generator().manual_seed(0)
    one, other = (
        Calibration.collect(llama, torch.randint(3, tiny.VOCABULARY, (8, 40), generator=draw), cache=False)
        for _ in range(2)
    )
    up, tokenizer = "model.layers.1.mlp.up_proj", tiny.tokenizer_of_characters()
    plan = Plan({up: GPTQ(16)}, "beam", {}, model_identity(llama), one.identity)
    with pytest.raises(InputError, match=f"measured with another calibration \\({one.identity[:12]}"):
        export_checkpoint(llama, tokenizer, plan, tmp_path / "out", calibration=other)
    with pytest.raises(InputError, match="measured with another calibration"):
        dtm.accelerate(llama, plan, calibration=other)
    assert list(tmp_path.iterdir()) == []
    export_checkpoint(llama, tokenizer, plan, tmp_path / "out", calibration=one)
    assert Plan.read(tmp_path / "out" / "dtm_plan.json") == plan
    # Where no treatment looks at inputs, it does not matter.
    Plan({up: Int8()}, "beam", {}, model_identity(llama), one.identity).check(Decoder.of(llama, other))


# What vLLM fuses.


def test_a_torn_set_is_a_warning_and_for_vllm_an_error(export, tmp_path):
    torn = {QKV[0]: W8A8(), GATED[1].format(2): Int8()}
    with pytest.raises(TreatmentError) as refused:
        export(torn, for_vllm=True)
    said = str(refused.value)
    assert "model.layers.0.self_attn.qkv_proj" in said
    assert "q_proj is int-quantized, k_proj is dense, v_proj is dense" in said
    assert "(and 1 more)" in said
    assert "fused=True" in said
    assert "\n" not in said
    assert list(tmp_path.iterdir()) == []
    problems = export(torn).problems
    assert len(problems) == 2
    assert problems[0].startswith("vLLM: model.layers.0.self_attn.qkv_proj: ")
    assert "gate_proj is ignored, up_proj is in group_01" in problems[1]


def test_whole_sets_are_fit_for_vllm(export):
    assert export(MIXED, for_vllm=True).problems == []


# Refused.


def files(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_every_file_has_the_mode_that_the_umask_allows(export):
    before = os.umask(0o027)
    try:
        exported = export()
    finally:
        os.umask(before)
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in exported.folder.iterdir()}
    assert {"model.safetensors", "masks.safetensors"} <= modes.keys()
    assert set(modes.values()) == {0o640}


def test_a_folder_with_something_in_it_is_left_alone(export, tmp_path):
    exported = export()
    before = files(exported.folder)
    with pytest.raises(RunError, match="out: there is something already; choose another folder"):
        export(WITH_DROP)
    assert files(exported.folder) == before
    (tmp_path / "file").write_text("x")
    model, tokenizer = exported.model, tiny.tokenizer_of_characters()
    with pytest.raises(RunError, match="file: there is something already"):
        export_checkpoint(model, tokenizer, plan_for(model, MIXED), tmp_path / "file")
    with pytest.raises(RunError, match="below: cannot be written: "):
        export_checkpoint(model, tokenizer, plan_for(model, MIXED), tmp_path / "file" / "below")


def test_an_empty_folder_and_one_whose_parents_are_not_there_are_filled(export, tmp_path):
    (tmp_path / "out").mkdir()
    exported = export()
    deep = tmp_path / "a" / "b"
    export_checkpoint(exported.model, tiny.tokenizer_of_characters(), plan_for(exported.model, MIXED), deep)
    written, again = files(exported.folder), files(deep)
    assert written.keys() == again.keys()
    # safetensors orders the metadata of the masks as it happens to.
    assert {name for name in written if written[name] != again[name]} <= {"masks.safetensors"}


def test_the_folder_one_is_in_and_a_link_to_a_folder_are_filled(llama, tmp_path, monkeypatch):
    plan, tokenizer = plan_for(llama, MIXED), tiny.tokenizer_of_characters()
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    monkeypatch.chdir(tmp_path / "here")
    for folder, found in ((".", "here"), (tmp_path / "link", "there")):
        export_checkpoint(llama, tokenizer, plan, folder)
        assert (tmp_path / found / "model.safetensors").is_file()
    assert (tmp_path / "link").is_symlink()


def test_nothing_is_left_of_an_export_that_fails_midway(tmp_path, llama, monkeypatch):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    tokenizer = tiny.tokenizer_of_characters()
    monkeypatch.setattr(tokenizer, "save_pretrained", fail)
    before = model_identity(llama)
    with pytest.raises(RunError, match=r"out: cannot be written: .*No space left"):
        export_checkpoint(llama, tokenizer, plan_for(llama, MIXED), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    assert model_identity(llama) == before


def test_what_no_checkpoint_can_say_is_refused(export, tmp_path):
    up = "model.layers.1.mlp.up_proj"
    with pytest.raises(
        TreatmentError, match=f"{up}: no form of a checkpoint says what llm_int8 does to inputs"
    ):
        export({up: LLMInt8()})
    gpt2 = tiny.model_of("gpt2")
    path = dtm.components(gpt2)[0]
    with pytest.raises(TreatmentError, match=f"{path}: w8a8 cannot be exported: .* and this is Conv1D"):
        export({path: W8A8()}, gpt2)
    with pytest.raises(TreatmentError, match="calibration"):
        export({up: GPTQ(16)})
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_not_finite_are_refused(llama, tmp_path):
    with torch.no_grad():
        llama.get_submodule(QKV[1]).weight[2, 3] = torch.nan
    with pytest.raises(TreatmentError, match=rf"{QKV[1]}: .* got 1 NaN or infinite"):
        export_checkpoint(llama, tiny.tokenizer_of_characters(), plan_for(llama, MIXED), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_plan_for_another_model_and_a_model_that_is_quantized_are_refused(llama, tmp_path):
    tokenizer, other = tiny.tokenizer_of_characters(), tiny.model_of("llama", seed=1)
    with pytest.raises(InputError, match="made for another model"):
        export_checkpoint(llama, tokenizer, plan_for(other, MIXED), tmp_path / "out")
    with pytest.raises(InputError, match="tokenizer: expected the model's, got NoneType"):
        export_checkpoint(llama, None, plan_for(llama, MIXED), tmp_path / "out")
    with pytest.raises(ModelError, match="the tokenizer is of another vocabulary"):
        export_checkpoint(
            llama, tiny.tokenizer_of_characters(extra=50), plan_for(llama, MIXED), tmp_path / "out"
        )
    with pytest.raises(InputError, match=r"plan: expected a Plan, got dict; Plan\(configuration, "):
        export_checkpoint(llama, tokenizer, MIXED, tmp_path / "out")
    dtm.accelerate(llama, {QKV[0]: W8A8()})
    with pytest.raises(ModelError, match="the model is accelerated"):
        export_checkpoint(llama, tokenizer, Plan({}, "by hand", {}), tmp_path / "out")
    dtm.restore(llama)
    llama.generation_config.temperature = 0.7
    with pytest.raises(ModelError, match=r"generation_config cannot be saved: .*temperature"):
        export_checkpoint(llama, tokenizer, plan_for(llama, MIXED), tmp_path / "out")
    llama.config.quantization_config = {"quant_method": "compressed-tensors"}
    with pytest.raises(ModelError, match="quantized already"):
        export_checkpoint(llama, tokenizer, plan_for(llama, MIXED), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_other_families_are_exported_as_well(export, family):
    model = tiny.model_of(family)
    exported = export({path: Prune(0.6) for path in dtm.components(model)[::2]}, model)
    assert exported.problems == []
    stored = exported.tensors
    for path in exported.configuration:
        component = Decoder.of(model).component(path)
        weight = stored[f"{path}.weight"]
        weight = weight.t() if component.transposed else weight
        assert torch.equal(weight, Prune(0.6).compress(component.weight))


@pytest.mark.filterwarnings("ignore:.*are no components")
def test_what_plain_transformers_does_not_load_is_said(export):
    model = tiny.with_experts()
    exported = export({"model.layers.0.self_attn.q_proj": W8A8()}, model)
    (said,) = [line for line in exported.problems if line.startswith("transformers: ")]
    assert "does not load a model with experts (model.layers.0.mlp.experts" in said
    with pytest.raises(RuntimeError):
        AutoModelForCausalLM.from_pretrained(exported.folder)
    load_export(exported.folder)
