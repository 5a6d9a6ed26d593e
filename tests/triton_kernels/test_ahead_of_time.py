"""Every Triton kernel compiles to machine code for Ampere and Hopper, with the instructions meant; no GPU is needed."""

import re
from dataclasses import dataclass, field

import pytest
import torch

triton = pytest.importorskip("triton", exc_type=ImportError)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from dtm_fast.triton_kernels import (  # noqa: E402
    bitmap_linear,
    int8_linear,
    layer_rows,
    masked_linear,
    quantize_int8,
    token_divergence,
    unpack_mask,
)

pytestmark = [pytest.mark.once, pytest.mark.process]  # ptxas

CAPABILITIES = [80, 90]


@dataclass(frozen=True)
class Kernel:
    """A kernel with the types of its pointers and floats, and its constants; the rest are int32, multiples of 16."""

    function: triton.JITFunction
    pointers: dict[str, str]
    config: triton.Config
    constants: dict[str, object] = field(default_factory=dict)
    options: dict[str, object] = field(default_factory=dict)

    def ptx(self, capability: int) -> str:
        """Compile, see that there is machine code, and return the text it was assembled from."""
        constants = {**self.constants, **self.config.kwargs}
        names = self.function.arg_names
        signature = {
            name: "constexpr" if name in constants else self.pointers.get(name, "i32") for name in names
        }
        whole = [name for name in names if signature[name] not in ("constexpr", "fp32")]
        aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in whole}
        options = {"num_warps": self.config.num_warps, "num_stages": self.config.num_stages, **self.options}
        compiled = triton.compile(
            ASTSource(self.function, signature, constexprs=constants, attrs=aligned),
            target=GPUTarget("cuda", capability, 32),
            options=options,
        )
        assert compiled.asm["cubin"][:4] == b"\x7fELF"
        text = compiled.asm["ptx"]
        assert re.search(rf"\.target sm_{capability}a?\b", text)
        return text


def masked_linear_of(dtype: torch.dtype, pointer: str) -> Kernel:
    return Kernel(
        masked_linear.masked_linear_kernel,
        {"x": pointer, "weight": pointer, "mask": "*u8", "bias": pointer, "y": pointer},
        masked_linear.CONFIGS[dtype][0],
        {"HAS_BIAS": True},
    )


def token_divergence_of(dtype: torch.dtype, pointer: str) -> Kernel:
    pointers = {"ranks": "*i32", "tokens": "*i32", "totals": "*fp32", "own_logits": "*fp32"}
    return Kernel(
        token_divergence.summarize_kernel,
        {"hidden": pointer, "lm_head": pointer, "reference": "*i64", **pointers},
        token_divergence.CONFIGS[dtype][0],
        {"BLOCK_V": token_divergence.BLOCK_V},
    )


QUANTIZE_INT8 = Kernel(
    quantize_int8.quantize_int8_kernel,
    {"x": "*bf16", "q": "*i8", "scales": "*fp32"},
    quantize_int8.CONFIGS[0],
)
INT8_LINEAR = Kernel(
    int8_linear.int8_linear_kernel,
    {"qx": "*i8", "scales_x": "*fp32", "qweight": "*i8", "scales": "*fp32", "bias": "*bf16", "y": "*bf16"},
    int8_linear.CONFIGS[0],
    {"HAS_BIAS": True},
    int8_linear.UNFUSED,
)
BITMAP_LINEAR = Kernel(
    bitmap_linear.bitmap_linear_kernel,
    {"x": "*bf16", "bits": "*i32", "begins": "*i64", "values": "*bf16", "bias": "*bf16", "y": "*bf16"},
    bitmap_linear.CONFIGS[0],
    {"HAS_BIAS": True, "BLOCK_M": bitmap_linear.BLOCK_M},
)
MERGE = Kernel(
    token_divergence.merge_kernel,
    {
        **{"ranks": "*i32", "tokens": "*i32", "totals": "*fp32", "own_logits": "*fp32"},
        **{"reference": "*i64", "mismatch": "*u8", "nll": "*fp32"},
    },
    token_divergence.MERGE_CONFIG,
)


def layer_rows_of(pointer: str) -> list[Kernel]:
    """Those between the products of a layer, of states in one dtype."""
    many, few = triton.Config({"BLOCK": 4096}, num_warps=8), triton.Config({"BLOCK": 2048}, num_warps=8)
    heads = triton.Config({"HALF": 64, "HALF_BLOCK": 64, "HEADS": 32}, num_warps=4)
    norm = dict.fromkeys(("x", "branch", "total", "weight", "out"), pointer) | {"eps": "fp32"}
    found = [
        *(Kernel(layer_rows._norm_kernel, norm, many, {"HAS_BRANCH": each}) for each in (False, True)),
        Kernel(
            layer_rows._rotate_kernel,
            dict.fromkeys(("x", "cosine", "sine", "out"), pointer),
            heads,
            options={"enable_fp_fusion": False},
        ),
        Kernel(layer_rows._gated_kernel, dict.fromkeys(("gate", "up", "out"), pointer), few),
    ]
    if pointer == "*fp32":
        change = dict.fromkeys(("x", "change", "weight"), pointer) | {"out": "*bf16", "eps": "fp32"}
        gates = dict.fromkeys(("gate", "up", "d_gate", "d_up"), pointer) | {"out": "*bf16"}
        has = {"HAS_GATE": True, "HAS_UP": True}
        found += [
            Kernel(layer_rows._change_norm_kernel, change, many),
            Kernel(layer_rows._change_gated_kernel, gates, few, has),
        ]
    return found


UNPACK_MASK = Kernel(unpack_mask.unpack_mask_kernel, {"packed": "*u8", "mask": "*u8"}, unpack_mask.CONFIGS[0])


@pytest.fixture(autouse=True)
def _compiled_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.fixture(params=CAPABILITIES)
def capability(request) -> int:
    return request.param


def test_quantize_int8_divides_as_ieee_says(capability):
    ptx = QUANTIZE_INT8.ptx(capability)
    assert "div.rn.f32" in ptx
    assert not re.search(r"div\.(full|approx)|rcp\.|\.ftz", ptx)


def test_int8_linear_uses_tensor_cores_and_rounds_every_step(capability):
    ptx = INT8_LINEAR.ptx(capability)
    matrix = r"wgmma\.mma_async\S*\.s32\.s8\.s8" if capability == 90 else r"mma\.sync\S*\.s32\.s8\.s8\.s32"
    assert re.search(matrix, ptx)
    # Without the suffix, ptxas could still join a multiplication and an addition.
    assert "mul.rn.f32" in ptx
    assert "add.rn.f32" in ptx
    assert not re.search(r"\bfma\.|\bmul\.f32|\badd\.f32", ptx)


def test_masked_linear_uses_tensor_cores_for_bfloat16_alone(capability):
    matrix = r"wgmma\.mma_async\S*\.f32\.bf16" if capability == 90 else r"mma\.sync\S*\.f32\.bf16\.bf16\.f32"
    assert re.search(matrix, masked_linear_of(torch.bfloat16, "*bf16").ptx(capability))
    ptx = masked_linear_of(torch.float32, "*fp32").ptx(capability)
    assert "fma.rn.f32" in ptx
    assert not re.search(r"mma\.|tf32", ptx)


def test_bitmap_linear_uses_tensor_cores(capability):
    assert re.search(r"mma\.sync\S*\.f32\.bf16\.bf16\.f32", BITMAP_LINEAR.ptx(capability))


def test_token_divergence_uses_tensor_cores_for_bfloat16_and_rounds_its_logits(capability):
    ptx = token_divergence_of(torch.bfloat16, "*bf16").ptx(capability)
    matrix = r"wgmma\.mma_async\S*\.f32\.bf16" if capability == 90 else r"mma\.sync\S*\.f32\.bf16\.bf16\.f32"
    assert re.search(matrix, ptx)
    assert re.search(r"cvt\.rn\.bf16", ptx)


def test_token_divergence_of_float32_uses_no_tensor_cores():
    assert not re.search(r"mma\.|tf32", token_divergence_of(torch.float32, "*fp32").ptx(90))


def test_what_only_moves_bytes_compiles(capability):
    assert "st.global.v4" in UNPACK_MASK.ptx(capability)
    assert "ex2.approx" in MERGE.ptx(capability)


@pytest.mark.parametrize("pointer", ["*bf16", "*fp32"])
def test_what_stands_between_the_products_of_a_layer_reads_whole_words(capability, pointer):
    for kernel in layer_rows_of(pointer):
        assert re.search(r"ld\.global(\.\w+)*\.v[24]\.", kernel.ptx(capability)), kernel.function.__name__
