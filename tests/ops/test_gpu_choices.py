"""backend=None on a GPU: the order that was measured, on a GPU that is pretended."""

import json

import pytest
import torch

from dtm_fast.ops import backends, gpu_choices, native

ROWS = [
    {
        "operation": "int8_linear",
        "dtype": "bfloat16",
        "most_tokens": 16,
        "ranking": ["triton", "cuda", "reference"],
    },
    {
        "operation": "int8_linear",
        "dtype": "bfloat16",
        "most_tokens": None,
        "ranking": ["cuda", "triton", "reference"],
    },
    {
        "operation": "masked_linear",
        "dtype": "bfloat16",
        "most_tokens": None,
        "ranking": ["reference", "cuda"],
    },
]
GPU = torch.device("cuda", 0)


@pytest.fixture
def pretended(tmp_path, monkeypatch):
    """A GPU that torch names, the files that know GPUs, and both kernels built: a function of name and capability."""
    content = {"device": "NVIDIA X1", "capability": "9.0", "source": "x1.json", "rows": ROWS}
    (tmp_path / "x1.json").write_text(json.dumps(content))
    monkeypatch.setattr(gpu_choices, "FOLDER", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(native, "load", lambda name: (native, "loaded"))
    monkeypatch.setattr(native, "why_no_triton", lambda: None)

    def clear() -> None:
        gpu_choices.known.cache_clear()
        backends._on_gpu.cache_clear()

    def gpu(name: str, capability: tuple[int, int]) -> None:
        clear()
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)

    yield gpu
    clear()


def test_the_measured_order_of_this_gpu(pretended):
    pretended("NVIDIA X1", (9, 0))
    assert backends.choose("int8_linear", None, GPU, torch.bfloat16, 16) == "triton"
    assert backends.choose("int8_linear", None, GPU, torch.bfloat16, 17) == "cuda"
    assert backends.choose("masked_linear", None, GPU, torch.bfloat16, 1) == "reference"
    assert backends.default("int8_linear", "cuda") == ("cuda", "measured on NVIDIA X1 (x1.json)")


def test_what_was_not_measured(pretended):
    pretended("NVIDIA X1", (9, 0))
    assert backends.choose("int8_linear", None, GPU, torch.float32, 16) == "cuda"
    assert backends.choose("token_divergence", None, GPU, torch.bfloat16, 5) == "cuda"
    assert backends.choose("pack_mask", None, GPU) == "reference"


def test_another_gpu_of_the_same_capability_and_one_of_another(pretended):
    pretended("NVIDIA X2", (9, 0))
    assert backends.choose("int8_linear", None, GPU, torch.bfloat16, 16) == "triton"
    pretended("NVIDIA Y", (8, 0))
    assert backends.choose("int8_linear", None, GPU, torch.bfloat16, 16) == "cuda"
    assert backends.default("int8_linear", "cuda") == ("cuda", "not measured on NVIDIA Y")


def test_what_cannot_run_is_passed_over_and_named(pretended, monkeypatch):
    pretended("NVIDIA X1", (9, 0))
    monkeypatch.setattr(native, "why_no_triton", lambda: "triton is not installed")
    assert backends.choose("int8_linear", None, GPU, torch.bfloat16, 16) == "cuda"
    monkeypatch.setattr(native, "load", lambda name: (None, "not built"))
    backends._on_gpu.cache_clear()
    expected = "measured on NVIDIA X1 (x1.json); not cuda: not built; not triton: triton is not installed"
    assert backends.default("int8_linear", "cuda") == ("reference", expected)


def test_the_files_that_are_there_are_whole():
    for each in gpu_choices.known():
        assert each.device
        assert each.source
        for row in each.rows:
            assert row["operation"] in backends.CUDA_OPERATIONS
            assert row["dtype"] in ("float32", "bfloat16")
            assert set(row["ranking"]) <= {"cuda", "triton", "reference"}
            assert row["ranking"][-1] == "reference" or "reference" in row["ranking"]
