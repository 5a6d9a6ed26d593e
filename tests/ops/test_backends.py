"""Choice of backend and instruction set: nothing falls back silently."""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

from dtm_fast import ops
from dtm_fast.ops import backends, native

X = torch.arange(12.0).reshape(3, 4)
PACKED = torch.full((3, 1), 5, dtype=torch.uint8)
CALLS: dict[str, Callable[[str | None], object]] = {
    "quantize_int8": lambda backend: ops.quantize_int8(X, backend=backend),
    "int8_linear": lambda backend: ops.int8_linear(
        X, torch.ones(3, 4, dtype=torch.int8), torch.ones(3), backend=backend
    ),
    "pack_mask": lambda backend: ops.pack_mask(X > 3, backend=backend),
    "unpack_mask": lambda backend: ops.unpack_mask(PACKED, 4, backend=backend),
    "apply_mask": lambda backend: ops.apply_mask(X, PACKED, backend=backend),
    "masked_linear": lambda backend: ops.masked_linear(X, X, PACKED, backend=backend),
    "pack_sparse": lambda backend: ops.SparseWeight.pack(X, backend=backend),
    "sparse_linear": lambda backend: ops.sparse_linear(
        X, ops.SparseWeight.pack(X, backend="reference"), backend=backend
    ),
    "bitmap_linear": lambda backend: ops.bitmap_linear(
        X.bfloat16(), ops.BitmapWeight.pack(X.bfloat16()), backend=backend
    ),
    "token_divergence": lambda backend: ops.token_divergence(
        X[None], X, torch.ones(1, 3, dtype=torch.int64), backend=backend
    ),
}


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name != native.ISA_VARIABLE}
    return subprocess.run(
        [sys.executable, "-W", "always", "-c", code], capture_output=True, text=True, env=clean | environment
    )


def test_every_operation_is_listed() -> None:
    assert tuple(CALLS) == backends.OPERATIONS


@pytest.mark.parametrize("operation", CALLS)
def test_forced_backends_that_cannot_run_say_why(operation: str) -> None:
    call = CALLS[operation]
    with pytest.raises(
        ValueError, match=r"backend: expected None, 'cpu', 'cuda', 'triton', 'reference', got 'avx2'"
    ):
        call("avx2")
    why = "the tensors are on cpu" if operation in backends.CUDA_OPERATIONS else "not implemented"
    for backend in ("triton", "cuda"):
        with pytest.raises(RuntimeError, match=rf"{operation}: backend '{backend}' cannot run: {why}"):
            call(backend)
    if operation not in backends.CPU_OPERATIONS:
        with pytest.raises(RuntimeError, match=rf"{operation}: backend 'cpu' cannot run: not implemented"):
            call("cpu")
        return
    with (
        native.use_cpu_isa("reference"),
        pytest.raises(
            RuntimeError, match=rf"{operation}: backend 'cpu' cannot run: DTM_FAST_CPU_ISA=reference is set"
        ),
    ):
        call("cpu")


@pytest.mark.parametrize("operation", CALLS)
def test_the_default_runs(operation: str) -> None:
    assert CALLS[operation](None) is not None
    with native.use_cpu_isa("reference"):
        assert CALLS[operation](None) is not None


@pytest.mark.process
def test_unknown_and_impossible_instruction_sets() -> None:
    for isa in ("avx1024", "AVX2", "neon"):
        with (
            pytest.raises(ValueError, match=rf"DTM_FAST_CPU_ISA={isa}: possible here: reference"),
            native.use_cpu_isa(isa),
        ):
            pass
    code = (
        "import torch; from dtm_fast.ops import native;"
        "native.detected_cpu_isa = lambda: 'avx2';"
        "from dtm_fast import ops; ops.pack_mask(torch.ones(2, 2, dtype=torch.bool))"
    )
    done = run_python(code, DTM_FAST_CPU_ISA="avx512")
    assert done.returncode != 0
    expected = "dtm_fast.errors.InputError: DTM_FAST_CPU_ISA=avx512: possible here: reference, avx2"
    assert done.stderr.splitlines()[-1] == expected


@pytest.mark.process
def test_the_variable_forces_each_instruction_set(isas: tuple[str, ...]) -> None:
    code = "import json; from dtm_fast import ops; print(json.dumps(ops.backend_info()))"
    for isa in ("reference", isas[0]):
        info = json.loads(run_python(code, DTM_FAST_CPU_ISA=isa).stdout)
        assert info["cpu"]["isa_forced"] == info["cpu"]["isa_in_use"] == isa
        backend = info["operations"]["masked_linear"]["cpu"]
        assert backend["backend"] == ("reference" if isa == "reference" else "cpu")
        assert isa in backend["reason"]


def test_backend_info_says_what_runs() -> None:
    info = json.loads(json.dumps(ops.backend_info()))
    assert info["cpu"]["name"]
    assert info["cpu"]["threads"] == torch.get_num_threads()
    assert set(info["operations"]) == set(backends.OPERATIONS)
    for name, operation in info["operations"].items():
        native_cuda = name in backends.CUDA_OPERATIONS and info["native_cuda"]["available"]
        assert operation["cuda"]["backend"] == ("cuda" if native_cuda else "reference")
        without = native.cpu_isa() == "reference" or name not in backends.CPU_OPERATIONS
        assert operation["cpu"]["backend"] == ("reference" if without else "cpu")
        assert all(each["reason"] for each in operation.values())


@pytest.mark.process
def test_without_native_modules_there_is_one_warning_and_the_twins_run() -> None:
    code = """
import sys
sys.modules["dtm_fast._cpu"] = sys.modules["dtm_fast._cuda"] = None
import torch
from dtm_fast import ops
for _ in range(3):
    q, scale = ops.quantize_int8(torch.tensor([[1.0, -2.0]]))
    y = ops.int8_linear(torch.tensor([[3.0, 4.0]]), q, scale)
assert q.tolist() == [[64, -127]], q
try:
    ops.pack_mask(torch.ones(1, 1, dtype=torch.bool), backend="cpu")
except RuntimeError as error:
    print(error)
info = ops.backend_info()
assert not info["native_cpu"]["available"] and info["operations"]["int8_linear"]["cpu"]["backend"] == "reference"
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("RuntimeWarning: dtm_fast runs on its slow reference twins") == 1
    assert "DTM_FAST_NATIVE=ON" in done.stderr
    assert done.stdout.startswith("pack_mask: backend 'cpu' cannot run: dtm_fast._cpu is not built")
    impossible = run_python(code, DTM_FAST_CPU_ISA="avx2")
    assert "DTM_FAST_CPU_ISA=avx2: possible here: reference (dtm_fast._cpu is not built" in impossible.stderr


def test_a_module_that_cannot_be_loaded_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise ImportError("libfoo.so.1: cannot open shared object file")

    monkeypatch.setattr(importlib, "import_module", broken)
    native.load.cache_clear()
    try:
        assert native.load("_cpu") == (
            None,
            "dtm_fast._cpu is built but cannot be loaded: libfoo.so.1: cannot open shared object file",
        )
    finally:
        monkeypatch.undo()
        native.load.cache_clear()


@pytest.mark.gpu
def test_unpack_mask_on_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    mask = torch.rand(507, 123) < 0.5
    packed = ops.pack_mask(mask).cuda()
    for backend in (None, "cuda", "reference"):
        assert torch.equal(ops.unpack_mask(packed, 123, backend=backend).cpu(), mask)
