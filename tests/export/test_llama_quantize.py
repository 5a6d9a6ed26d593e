"""The tensor types for llama-quantize, read as llama.cpp reads them."""

import re
from pathlib import Path

import gguf
import pytest
import tiny
import torch
from made_export import plan_for

import dtm_fast as dtm
from dtm_fast.compression import GPTQ, W8A8, Drop, Int4, Int8, LLMInt8, Prune
from dtm_fast.errors import ComponentError, InputError, ModelError, RunError, TreatmentError
from dtm_fast.export import export_llama_quantize
from dtm_fast.model import Decoder
from dtm_fast.plan import Plan

pytestmark = pytest.mark.once

Q, UP, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj", "model.layers.2.mlp.down_proj"


@pytest.fixture
def written(tmp_path: Path):
    """The file of a configuration of a tiny model."""

    def run(configuration, model=None) -> Path:
        model = tiny.model_of("llama") if model is None else model
        file = tmp_path / "types.txt"
        export_llama_quantize(plan_for(model, configuration), Decoder.of(model), file)
        return file

    return run


def read_by_llama_quantize(file: Path) -> list[tuple[str, str]]:
    """Words at white space; a name in lower case before the first =, behind it the type."""
    pairs = []
    for word in file.read_text().split():
        name, _, kind = word.partition("=")
        assert name
        assert kind in ("q8_0", "q4_1", "f32", "f16", "bf16")
        pairs.append((name.lower(), kind))
    return pairs


def type_of(tensor: str, pairs: list[tuple[str, str]]) -> str | None:
    """The first whose pattern is found anywhere in the name."""
    return next((kind for pattern, kind in pairs if re.search(pattern, tensor)), None)


def names_in_gguf(paths: list[str], layers: int) -> dict[str, str]:
    """Module → tensor, as llama.cpp's own converter maps them."""
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
    return {path: f"{table.get_name(path)}.weight" for path in paths}


def test_every_tensor_gets_its_type_and_no_other(written):
    # Twelve layers, so that a name may be the beginning of another.
    model = tiny.model_of("llama", num_hidden_layers=12)
    configuration = {
        "model.layers.1.self_attn.q_proj": W8A8(),
        "model.layers.11.self_attn.k_proj": Int8(),
        "model.layers.1.mlp.gate_proj": Int4(32),
        "model.layers.10.mlp.down_proj": Int4(None),
    }
    file = written(configuration, model)
    pairs = read_by_llama_quantize(file)
    names = names_in_gguf(dtm.components(model), 12)
    expected = {"w8a8": "q8_0", "int8": "q8_0", "int4(32)": "q4_1", "int4(row)": "q4_1"}
    for path, tensor in names.items():
        treatment = configuration.get(path)
        assert type_of(tensor, pairs) == ("f32" if treatment is None else expected[treatment.key]), path
        assert sum(bool(re.search(pattern, tensor)) for pattern, _ in pairs) == 1
    assert len(file.read_text().splitlines()) == len(pairs) == len(names) + 2
    assert "^blk\\.1\\.attn_q\\.weight$=q8_0" in file.read_text().splitlines()
    for tensor in ("token_embd.weight", "output.weight"):
        assert type_of(tensor, pairs) == "f32"
    for tensor in ("output_norm.weight", "blk.1.attn_norm.weight", "blk.1.attn_q.bias"):
        assert type_of(tensor, pairs) is None


@pytest.mark.parametrize(
    ("dtype", "kind"), [(torch.float32, "f32"), (torch.float16, "f16"), (torch.bfloat16, "bf16")]
)
def test_what_is_not_treated_stays_in_the_models_dtype(written, dtype, kind):
    pairs = read_by_llama_quantize(written({Q: Int8()}, tiny.model_of("llama").to(dtype)))
    assert [kind for _, kind in pairs].count("q8_0") == 1
    assert {kind for _, kind in pairs} == {"q8_0", kind}


def test_a_tied_head_has_no_line(written):
    model = tiny.model_of("llama", tie_word_embeddings=True)
    names = [name for name, _ in read_by_llama_quantize(written({}, model))]
    assert "^token_embd\\.weight$" in names
    assert "^output\\.weight$" not in names


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_families_of_the_same_names(written, family):
    model = tiny.model_of(family)
    assert len(read_by_llama_quantize(written({}, model))) == len(dtm.components(model)) + 2


def test_q4_1_has_no_wider_step_than_int4():
    """Why Int4 is q4_1: its 16 values reach from the least to the greatest of 32, in steps of a fifteenth."""
    weight = torch.randn(8, 128, generator=torch.Generator().manual_seed(0))
    blocks = weight.view(8, 4, 32)
    step_of_block = (blocks.amax(-1) - blocks.amin(-1)) / 15
    step_of_group = (weight.amax(-1).clamp(min=0) - weight.amin(-1).clamp(max=0)) / 15
    assert bool((step_of_block <= step_of_group[:, None]).all())
    error = (Int4(128).compress(weight) - weight).abs().amax(dim=-1)
    assert bool((error <= step_of_group * 0.5001).all())


@pytest.mark.parametrize(
    "treatment", [Prune(0.5), Prune("2:4"), Drop(), LLMInt8()], ids=lambda treatment: treatment.key
)
def test_what_llama_quantize_cannot_do_is_refused(written, tmp_path, treatment):
    with pytest.raises(TreatmentError) as refused:
        written({Q: Int8(), UP: treatment})
    assert str(refused.value) == f"{UP}: llama-quantize has nothing like {treatment.key}"
    assert list(tmp_path.iterdir()) == []


def test_calibrated_weights_are_refused_too(written):
    model = tiny.model_of("llama")
    decoder = Decoder.of(model)
    plan = Plan({UP: GPTQ(32)}, "beam", {}, "")
    with pytest.raises(InputError, match="calibration"):
        export_llama_quantize(plan, decoder, "types.txt")


def test_blocks_that_do_not_fit_are_refused(written):
    model = tiny.model_of("llama", hidden_size=48)
    with pytest.raises(TreatmentError, match=f"{UP}: q8_0 needs a K that is a multiple of 32, and K = 48"):
        written({UP: Int8()}, model)
    assert written({DOWN: Int8()}, model)
    with pytest.raises(
        TreatmentError, match=rf"{DOWN}: int4\(16\) has groups of 16, and those of q4_1, of 32"
    ):
        written({DOWN: Int4(16)})


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "opt", "phi3"])
def test_names_that_are_not_known_are_refused(written, family):
    model = tiny.model_of(family)
    with pytest.raises(ComponentError, match=r"\.0\..*: not a name of Llama's kind"):
        written({}, model)


def test_other_models_dtypes_and_places_are_refused(written, tmp_path):
    model = tiny.model_of("llama")
    plan = plan_for(tiny.model_of("llama", seed=1), {Q: Int8()})
    with pytest.raises(InputError, match="made for another model"):
        export_llama_quantize(plan, Decoder.of(model), tmp_path / "types.txt")
    with pytest.raises(ModelError, match=r"llama.cpp has no type for torch.float64"):
        written({}, tiny.model_of("llama").double())
    with pytest.raises(RunError, match=r"types.txt: cannot be written: No such file"):
        export_llama_quantize(plan_for(model, {}), Decoder.of(model), tmp_path / "none" / "types.txt")
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_written_over(written):
    before = written({}).read_text()
    after = written({Q: Int8()}).read_text()
    assert before.replace("attn_q\\.weight$=f32", "attn_q\\.weight$=q8_0", 1) == after
