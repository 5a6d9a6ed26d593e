"""A plan of SmolLM2 through plain transformers and back onto the kernels."""

import shutil
from pathlib import Path

import pytest
import torch
from made_export import arithmetic_of_transformers, plan_for
from transformers import AutoModelForCausalLM

import dtm_fast as dtm
from dtm_fast import nn
from dtm_fast.compression import W8A8, Int8, Prune
from dtm_fast.compression.break_even import faster_layer
from dtm_fast.export import export_checkpoint, load_export, validate
from dtm_fast.measure import ReferenceEvaluator
from dtm_fast.model import model_identity

TEXT = (
    "The river was low that summer, and the boats lay on the mud below the old mill, drying in the sun. " * 3
)


@pytest.fixture
def folder(tmp_path: Path):
    """Half a gigabyte that is not kept."""
    yield tmp_path / "out"
    shutil.rmtree(tmp_path / "out", ignore_errors=True)


@pytest.mark.model
def test_smollm2_is_exported_and_measured_again(smollm2, folder):
    model, tokenizer = smollm2
    before = model_identity(model)
    probes = dtm.Probes.from_text(model, tokenizer, TEXT, 12, 16, 4, cache=False)
    weights = {
        path: Int8() for path in dtm.components(model) if path.endswith(("gate_proj", "up_proj", "o_proj"))
    }
    pruned = {"model.layers.20.mlp.down_proj": Prune(0.6), "model.layers.9.mlp.down_proj": Prune(0.1)}
    inputs = {f"model.layers.{layer}.self_attn.{name}_proj": W8A8() for layer in (3, 17) for name in "qkv"}
    configuration = weights | pruned | inputs
    problems = export_checkpoint(model, tokenizer, plan_for(model, configuration), folder, for_vllm=True)
    assert problems == validate(folder) == []
    assert model_identity(model) == before

    by_transformers = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    assert by_transformers.lm_head.weight is by_transformers.model.embed_tokens.weight
    with torch.no_grad():
        by_transformers(probes.tokens[:1])  # decompresses
    found = ReferenceEvaluator(by_transformers, probes, base=model).measure([{}], ["dppl"])[0]
    with arithmetic_of_transformers(model, configuration):
        expected = ReferenceEvaluator(model, probes).measure([{}], ["dppl"])[0]
    assert found.fdt.tolist() == expected.fdt.tolist()
    assert torch.equal(found.dppl, expected.dppl)
    del by_transformers

    loaded, loaded_tokenizer = load_export(folder)
    assert loaded_tokenizer(TEXT).input_ids == tokenizer(TEXT).input_ids
    kinds = {path: type(loaded.get_submodule(path)) for path in configuration}
    assert {kinds[path] for path in inputs} == {nn.Int8Linear}
    for path, treatment in pruned.items():
        faster, _ = faster_layer(treatment.compress(model.get_submodule(path).weight.detach()))
        assert kinds[path] is (nn.SparseLinear if faster is nn.SparseLinear else torch.nn.Linear)
    planned = ReferenceEvaluator(model, probes).measure([configuration])[0]
    found = ReferenceEvaluator(loaded, probes, base=model).measure([{}])[0]
    assert found.fdt.tolist() == planned.fdt.tolist()
    assert bool((planned.fdt < 16).any())
    assert model_identity(model) == before
