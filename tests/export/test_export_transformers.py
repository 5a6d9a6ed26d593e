"""Exported folders loaded by plain transformers, with compressed-tensors: what it computes from them, to the bit.

It decompresses the weights at the first forward pass and multiplies in floats.
- A pack-quantized weight of a float32 model is the very weight of the treatment ``Int8``, and a dense one that of its
  own: such a plan gives the logits that were measured, and so the FDT.
- The inputs of an int-quantized one are quantized per token as well, but to steps of absmax / 127.5 between -128 and
  127, where the treatment ``W8A8``, ``ops.int8_linear`` and vLLM have absmax / 127 and ±127.
- In bfloat16 it rounds a weight's scale to bfloat16 before it multiplies.
``arithmetic_of_transformers`` says the last two.
"""

import pytest
import tiny
import torch
from made_export import ATTENTION, GATED, MIXED, WITH_DROP, Exported, arithmetic_of_transformers, model_in
from transformers import AutoModelForCausalLM, PreTrainedModel

import dtm_fast as dtm
from dtm_fast.compression import W8A8, Change, Configuration, Int8
from dtm_fast.measure import ReferenceEvaluator
from dtm_fast.model import Decoder, model_identity

pytestmark = pytest.mark.once

TOKENS = torch.arange(3, 67).view(2, 32)
WITHOUT_W8A8: Configuration = {p: t for p, t in (MIXED | WITH_DROP).items() if not isinstance(t, W8A8)}


@torch.no_grad()
def logits(model: PreTrainedModel, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    return model(input_ids=tokens, use_cache=False).logits


def loaded(exported: Exported) -> PreTrainedModel:
    """By plain transformers, decompressed."""
    model, info = AutoModelForCausalLM.from_pretrained(
        exported.folder, dtype="auto", output_loading_info=True
    )
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == exported.model.dtype
    logits(model)
    return model.eval()


def measured(exported: Exported) -> torch.Tensor:
    """The logits of the plan."""
    with Change(Decoder.of(exported.model), exported.configuration):
        return logits(exported.model)


def test_without_w8a8_the_logits_are_those_that_were_measured(export):
    exported = export(WITHOUT_W8A8)
    assert torch.equal(logits(loaded(exported)), measured(exported))


def test_what_is_loaded_is_measured_before_it_is_decompressed(export, make_probes):
    """Everything packed, so that no weight is there before the first pass."""
    base = tiny.model_of("llama")
    exported = export(dict.fromkeys(dtm.components(base), Int8()), base)
    other = AutoModelForCausalLM.from_pretrained(exported.folder, dtype="auto").eval()
    probes = make_probes(base, 4)
    (found,) = ReferenceEvaluator(other, probes, base=base).measure([{}], ["kl"])
    (expected,) = ReferenceEvaluator(base, probes).measure([exported.configuration], ["kl"])
    assert found.fdt.tolist() == expected.fdt.tolist()
    assert torch.equal(found.kl, expected.kl)


def test_a_model_has_all_its_components_as_soon_as_it_is_loaded(export):
    """A run on it could not be resumed if its first pass made more of them."""
    base = tiny.model_of("llama")
    model, _ = dtm.load_model(export(MIXED, base).folder)
    found, identity = dtm.components(model), model_identity(model)
    assert found == dtm.components(base)
    logits(model)
    assert (dtm.components(model), model_identity(model)) == (found, identity)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_w8a8_they_are_those_of_its_own_arithmetic(export, dtype):
    exported = export(MIXED, model_in(dtype))
    found = logits(loaded(exported))
    with arithmetic_of_transformers(exported.model, MIXED):
        assert torch.equal(found, logits(exported.model))
    assert not torch.equal(found, measured(exported))


@pytest.mark.parametrize("tied", [False, True])
def test_weights_are_decompressed_to_those_of_the_treatment(export, tied):
    exported = export(MIXED | WITH_DROP, tiny.model_of("llama", tie_word_embeddings=tied))
    model = loaded(exported)
    for path, treatment in exported.configuration.items():
        expected = treatment.compress(exported.model.get_submodule(path).weight.detach())
        assert torch.equal(model.get_submodule(path).weight, expected), path
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert torch.equal(model.lm_head.weight, exported.model.lm_head.weight)


def test_the_fdt_of_a_plan_without_w8a8_is_measured_again(export, make_probes):
    # Gentle enough that the text goes on for a while.
    configuration = {path: Int8() for path in dtm.components(tiny.model_of("llama"))[:-1]}
    exported = export(configuration)
    probes = make_probes(exported.model, count=8)
    planned = ReferenceEvaluator(exported.model, probes).measure([configuration], metrics=("dppl", "kl"))[0]
    found = ReferenceEvaluator(loaded(exported), probes, base=exported.model).measure(
        [{}], metrics=("dppl", "kl")
    )[0]
    assert planned.fdt.unique().numel() > 3
    for name in ("fdt", "sdt", "first_margin", "dppl", "kl"):
        assert torch.equal(getattr(found, name).nan_to_num(), getattr(planned, name).nan_to_num()), name


def test_the_fdt_of_w8a8_is_that_of_its_own_arithmetic(export, make_probes):
    configuration = {path.format(layer): W8A8() for path in (*ATTENTION, *GATED) for layer in range(3)}
    exported = export(configuration)
    probes = make_probes(exported.model, count=8)
    found = ReferenceEvaluator(loaded(exported), probes, base=exported.model).measure([{}])[0]
    with arithmetic_of_transformers(exported.model, configuration):
        expected = ReferenceEvaluator(exported.model, probes).measure([{}])[0]
    assert found.fdt.tolist() == expected.fdt.tolist()
    assert found.sdt.tolist() == expected.sdt.tolist()


def test_it_writes_text(export):
    model = loaded(export(MIXED))
    tokens = torch.arange(3, 13)[None]
    written = model.generate(tokens, max_new_tokens=6, do_sample=False)
    assert torch.equal(written[:, :10], tokens)
    assert int(written[0, 10]) == int(logits(model, tokens)[0, -1].argmax())
