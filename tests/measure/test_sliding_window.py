"""Layers whose positions see only the last few before them: the kernels have no window, and transformers' own run."""

import pytest
import tiny
import torch
from measurements import assert_same, needs_kernels
from rounding import assert_within_rounding, rounding_of

import dtm_fast as dtm
from dtm_fast.errors import ModelError
from dtm_fast.measure.device_layer import device_layers_of
from dtm_fast.measure.fused_layers import checked_parts
from dtm_fast.model import Decoder, gated_decoder
from dtm_fast.ops.layer_weights import Arithmetic, has_arithmetic

# The last of three layers alone: the others see the whole text.
LAST = {"use_sliding_window": True, "max_window_layers": 2, "layer_types": None}
WINDOWED = {"mistral": {}, "phi3": {}, "qwen2": LAST, "qwen3": LAST}
DTYPES = (torch.float32, torch.bfloat16)
LENGTH = 60


def windowed(name: str, window: int | None, dtype: torch.dtype = torch.bfloat16):
    return tiny.model_of(name, sliding_window=window, **WINDOWED[name]).to(dtype)


def checks_of(dtype: torch.dtype) -> list:
    kernels = has_arithmetic(Arithmetic.BFLOAT16 if dtype == torch.bfloat16 else Arithmetic.FLOAT32)
    return [device_layers_of, *([checked_parts] if kernels else [])]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [1, 30, LENGTH - 1])
@pytest.mark.parametrize("name", WINDOWED)
def test_a_window_shorter_than_the_text_is_refused(name, window, dtype):
    model, tokens = windowed(name, window, dtype), torch.arange(LENGTH)[None]
    for check in checks_of(dtype):
        reason = f"has a sliding window of {window}, and the text has {LENGTH} positions"
        with pytest.raises(ModelError, match=f"DecoderLayer {reason}$"):
            check(Decoder.of(model), tokens)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [LENGTH, 4096, None])
@pytest.mark.parametrize("name", WINDOWED)
def test_a_window_as_long_as_the_text_is_none(name, window, dtype):
    changes = {} if window is None else WINDOWED[name]
    model = tiny.model_of(name, sliding_window=window, **changes).to(dtype)
    for check in checks_of(dtype):
        assert len(check(Decoder.of(model), torch.arange(LENGTH)[None])) == tiny.LAYERS


def test_a_window_that_no_layer_uses_is_none():
    model = tiny.model_of(
        "qwen2", sliding_window=30, use_sliding_window=True, max_window_layers=3, layer_types=None
    )
    assert model.config.sliding_window == 30
    assert len(device_layers_of(Decoder.of(model), torch.arange(LENGTH)[None])) == tiny.LAYERS


@needs_kernels
@pytest.mark.parametrize("name", ["mistral", "qwen2"])
def test_it_is_measured_by_transformers_and_says_why(name, make_probes):
    if not has_arithmetic(Arithmetic.BFLOAT16):
        pytest.skip("the instruction set in use has no kernel for layers in bfloat16")
    model = windowed(name, 57)
    probes = make_probes(model, 4, 40, 20)
    evaluator = dtm.Evaluator(model, probes)
    reason = "DecoderLayer has a sliding window of 57, and the text has 60 positions"
    assert evaluator.engine.startswith("transformers' own layers (")
    assert reason in evaluator.engine
    configurations = [{}, *({path: dtm.Int8()} for path in dtm.components(model))]
    expected = dtm.ReferenceEvaluator(model, probes).measure(configurations, ())
    for ours, other in zip(evaluator.measure(configurations), expected, strict=True):
        assert_same(ours, other)
    for layers in ("fused", "torch"):
        with pytest.raises(ModelError, match=reason):
            dtm.Evaluator(model, probes, layers=layers)


@pytest.mark.parametrize("layers", ["fused", "torch"])
def test_a_window_that_is_ignored_is_more_than_rounding(layers, make_probes, monkeypatch):
    """The bound of the tests in bfloat16 tells wrong layers, of which few positions are wrong, from right ones."""
    if layers == "fused" and not has_arithmetic(Arithmetic.BFLOAT16):
        pytest.skip("the instruction set in use has no kernel for layers in bfloat16")
    monkeypatch.setattr(gated_decoder, "_window_of", lambda attention: None)
    for window in (None, 97):
        model = windowed("mistral", window)
        probes = make_probes(model, 8, 60, 40)
        configurations = [{path: dtm.Int8()} for path in dtm.components(model)]
        found = dtm.Evaluator(model, probes, layers=layers).measure(configurations, ())
        expected = dtm.ReferenceEvaluator(model, probes).measure(configurations)
        bound = rounding_of(model, probes)
        if window is None:
            assert_within_rounding(found, expected, bound)
        else:
            with pytest.raises(AssertionError):
                assert_within_rounding(found, expected, bound)
