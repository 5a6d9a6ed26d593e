"""Layers on our kernels in a model, and out again.

What is equal to what:
- torch's own layers with compressed weights, and TreatedInput, give the bits of the treatment.
- SparseLinear sums in another order: logits as near to the exact ones as torch's own, and so the same FDT and SDT.
- Int8Linear sums exactly what the treatment W8A8 sums in floats. For the same input the two are equal up to that sum's
  rounding, so one component has the FDT that was measured. With more of them, an input that lies between two int8
  steps now and then falls to the other side; then logits differ by part of what quantization itself does to them.
"""

import copy

import pytest
import tiny
import torch
import torch.nn.functional as F
from acceleration import (
    FAMILIES,
    MIXED,
    TOKENS,
    UP,
    error,
    everywhere,
    layers_of,
    logits,
    treated_logits,
    uncached,
)

import dtm_fast as dtm
from dtm_fast import nn
from dtm_fast.compression import (
    GPTQ,
    W8A8,
    Change,
    Drop,
    Int4,
    Int8,
    LLMInt8,
    Prune,
    SparseGPT,
    Treatment,
)
from dtm_fast.compression.accelerated import accelerate, restore
from dtm_fast.measure import ReferenceEvaluator
from dtm_fast.model import Calibration, Decoder
from dtm_fast.ops import native

# Which layer.


@pytest.mark.parametrize(
    ("treatment", "kind"),
    [
        (W8A8(), nn.Int8Linear),
        (Prune(0.5), nn.SparseLinear),
        (Prune("2:4"), nn.SparseLinear),
        (Prune(0.5, "wanda"), nn.SparseLinear),
        (SparseGPT(0.5), nn.SparseLinear),
        (Drop(), nn.SparseLinear),
        (Prune(0.05), torch.nn.Linear),
        (Int8(), torch.nn.Linear),
        (GPTQ(16), torch.nn.Linear),
    ],
    ids=lambda value: getattr(value, "key", None),
)
def test_each_treatment_gets_its_layer(
    kernels: None, sparse_pays: None, llama, treatment: Treatment, kind: type
) -> None:
    tokens = torch.randint(3, tiny.VOCABULARY, (4, 32), generator=torch.Generator().manual_seed(0))
    calibration = Calibration.collect(llama, tokens, cache=False) if treatment.needs_inputs else None
    decoder = Decoder.of(llama, calibration)
    with Change(decoder, {UP: treatment}):
        expected, weight = logits(llama), decoder.component(UP).weight
    report = accelerate(llama, {UP: treatment}, calibration=calibration)
    layer = llama.get_submodule(UP)
    assert type(layer) is kind
    assert report.components[UP].layer == kind.__name__
    assert report.components[UP].reason.startswith(f"{treatment.key}: ")
    own = layer.weight if kind is torch.nn.Linear else layer.to_linear().weight
    assert torch.equal(own, weight)
    assert error(logits(llama), expected) < 2**-18


def test_input_without_a_kernel_is_treated_before_the_product(llama) -> None:
    expected = treated_logits(llama, {UP: LLMInt8(1.0)})
    report = accelerate(llama, {UP: LLMInt8(1.0)})
    assert report.components[UP] == (
        "TreatedInput",
        "llm_int8(1.0): as measured, not faster: no kernel treats this input",
    )
    assert torch.equal(logits(llama), expected)
    assert "llm_int8(1.0)" in repr(llama.get_submodule(UP))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("treatment", [Int8(), Int4(16), LLMInt8(1.0), Prune(0.5)], ids=lambda each: each.key)
def test_what_no_kernel_computes_has_the_bits_of_the_treatment(
    model, dtype: torch.dtype, treatment: Treatment
) -> None:
    model.to(dtype)
    configuration = everywhere(model, treatment)
    expected = treated_logits(model, configuration)
    report = accelerate(model, configuration)
    assert torch.equal(logits(model), expected)
    assert all("as measured, not faster" in each.reason for each in report.components.values())


def test_float16_has_no_kernel_but_the_same_quality(llama) -> None:
    configuration = everywhere(llama.half(), W8A8(), Prune(0.5))
    expected = treated_logits(llama, configuration)
    report = accelerate(llama, configuration)
    assert {each.layer for each in report.components.values()} == {"TreatedInput", "Linear"}
    assert torch.equal(logits(llama), expected)


def test_a_forced_reference_says_that_nothing_is_faster(llama) -> None:
    with native.use_cpu_isa("reference"):
        report = accelerate(llama, everywhere(llama, W8A8(), Prune(0.9)))
        reasons = {each.layer: each.reason for each in report.components.values()}
    why = native.ISA_VARIABLE + "=reference is set"
    assert reasons == {
        "Int8Linear": f"w8a8: int8 products, not faster: {why}",
        "Linear": f"prune(0.9): as measured, not faster: our kernels cannot run: {why}",
    }


def test_the_report_names_every_component_and_prints_a_line_for_each(model) -> None:
    paths = dtm.components(model)
    chosen = {path: W8A8() for path in paths[::2]}
    report = accelerate(model, chosen)
    assert list(report.components) == paths
    for path in set(paths) - set(chosen):
        assert report.components[path] == (type(model.get_submodule(path)).__name__, "not in the plan")
    lines = str(report).splitlines()
    assert lines[0].startswith(f"{len(paths)} components: ")
    assert f"{len(chosen)} Int8Linear" in lines[0]
    assert lines[1] == f"{paths[0]}: Int8Linear, {report.components[paths[0]].reason}"
    assert len(lines) == 1 + len(paths)


# What it computes.


@pytest.mark.parametrize("treatment", [Prune(0.5), Prune(0.2)], ids=lambda each: each.key)
def test_pruned_models_diverge_where_it_was_measured(
    kernels: None, sparse_pays: None, model, make_probes, treatment: Treatment
) -> None:
    probes = make_probes(model)
    configuration = everywhere(model, treatment)
    measured = ReferenceEvaluator(model, probes).measure([configuration])[0]
    fast = copy.deepcopy(model)
    report = accelerate(fast, configuration)
    assert {each.layer for each in report.components.values()} == {"SparseLinear"}
    found = ReferenceEvaluator(fast, probes, base=model).measure([{}])[0]
    assert torch.equal(found.fdt, measured.fdt)
    assert torch.equal(found.sdt, measured.sdt)
    torch.testing.assert_close(found.dppl, measured.dppl, rtol=1e-4, atol=1e-4)
    assert int(measured.fdt.min()) < probes.completion


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_sparse_logits_err_no_more_than_torch_does(
    kernels: None, sparse_pays: None, family: str, dtype: torch.dtype
) -> None:
    wide = (
        {"n_embd": 256}
        if family == "gpt2"
        else {"hidden_size": 256, "intermediate_size": 640, "head_dim": 64}
    )
    model = tiny.model_of(family, initializer_range=0.06, **wide).to(dtype)
    configuration = everywhere(model, Prune(0.5))
    treated = treated_logits(model, configuration)
    exact = copy.deepcopy(model)
    for component in Decoder.of(exact).components.values():  # in this dtype, as what is dropped depends on it
        component.weight.copy_(Prune(0.5).compress(component.weight))
    accelerate(model, configuration)
    assert {type(each) for each in layers_of(model, configuration)} == {nn.SparseLinear}
    found, exact = logits(model), logits(exact.double())
    assert error(found, exact) <= 1.25 * error(treated, exact)


def test_one_int8_component_diverges_where_it_was_measured(model, make_probes) -> None:
    probes = make_probes(model)
    reference = ReferenceEvaluator(model, probes)
    fast = copy.deepcopy(model)
    for path in dtm.components(model)[:: 3 if len(dtm.components(model)) > 12 else 2]:
        measured = reference.measure([{path: W8A8()}])[0]
        accelerate(fast, {path: W8A8()})
        found = ReferenceEvaluator(fast, probes, base=model).measure([{}])[0]
        restore(fast)
        assert torch.equal(found.fdt, measured.fdt)
        assert torch.equal(found.sdt, measured.sdt)


def test_int8_everywhere_is_nearer_to_what_was_measured_than_that_to_the_base(model, make_probes) -> None:
    base = logits(model)
    configuration = everywhere(model, W8A8())
    treated = treated_logits(model, configuration)
    accelerate(model, configuration)
    assert error(logits(model), treated) < error(treated, base) / 2
    probes = make_probes(model, count=2)  # a model of which every component is accelerated has an evaluator
    assert ReferenceEvaluator(model, probes).measure([{}])[0].fdt.tolist() == [probes.completion] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_each_int8_layer_multiplies_what_the_treatment_makes(model, dtype: torch.dtype) -> None:
    model.to(dtype)
    decoder = Decoder.of(model)
    weights = {path: component.weight.clone() for path, component in decoder.components.items()}
    accelerate(model, everywhere(model, W8A8()))
    for path, weight in weights.items():
        layer = model.get_submodule(path)
        x = torch.randn(5, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(dtype)
        qx = W8A8().compress_input(x.float()).double()
        exact = F.linear(qx, W8A8().compress(weight.float()).double())
        magnitude = F.linear(qx.abs(), W8A8().compress(weight.float()).double().abs())
        if layer.bias is not None:
            exact, magnitude = exact + layer.bias.double(), magnitude + layer.bias.double().abs()
        allowed = 2**-21 * magnitude + torch.finfo(dtype).eps * exact.abs()
        assert bool(((layer(x).double() - exact).abs() <= allowed).all())


@pytest.mark.parametrize("treatments", [[W8A8()], [Prune(0.5)], MIXED], ids=["w8a8", "prune", "mixed"])
def test_with_a_cache_it_writes_what_it_writes_without(sparse_pays: None, model, treatments) -> None:
    accelerate(model, everywhere(model, *treatments))
    written = model.generate(
        TOKENS, max_new_tokens=12, min_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert torch.equal(written, uncached(model, TOKENS, 12))


def test_in_bfloat16_too_but_for_ties(sparse_pays: None, model) -> None:
    accelerate(model.to(torch.bfloat16), everywhere(model, *MIXED))
    written = model.generate(
        TOKENS, max_new_tokens=12, min_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    # The text that was written is read at once, and each token has the highest logit up to bfloat16's rounding.
    found = logits(model, written)[0, TOKENS.shape[1] - 1 : -1].float()
    assert found.dtype == torch.float32
    best = found.max(dim=-1).values
    chosen = found.gather(1, written[0, TOKENS.shape[1] :, None])[:, 0]
    assert bool((best - chosen <= 2**-5 * best.abs()).all())


@pytest.mark.once
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_it_compiles_whole(sparse_pays: None, family: str) -> None:
    model = tiny.model_of(family, num_hidden_layers=1)
    accelerate(model, everywhere(model, *MIXED))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = compiled(input_ids=TOKENS, use_cache=False).logits
    torch.testing.assert_close(found, logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.once
@torch.no_grad()
def test_what_was_compiled_before_is_compiled_anew(sparse_pays: None) -> None:
    llama = tiny.model_of(num_hidden_layers=1)
    torch._dynamo.reset()
    compiled = torch.compile(llama, fullgraph=True, backend="aot_eager")
    before = compiled(input_ids=TOKENS, use_cache=False).logits
    accelerate(llama, everywhere(llama, Prune(0.5)))
    torch.testing.assert_close(
        compiled(input_ids=TOKENS, use_cache=False).logits, logits(llama), rtol=1e-5, atol=1e-5
    )
    restore(llama)
    torch.testing.assert_close(compiled(input_ids=TOKENS, use_cache=False).logits, before)
