"""A plan as the tensor types that llama.cpp's llama-quantize is to use."""

import os
import re
from pathlib import Path

import torch

from dtm_fast.compression import W8A8, Int4, Int8, Treatment
from dtm_fast.errors import ComponentError, ModelError, RunError, TreatmentError
from dtm_fast.model import Component, Decoder
from dtm_fast.plan import Plan

_TENSORS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_BLOCK = 32
"""Weights of a row that share a scale in q8_0 and q4_1."""
_KEPT = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


def export_llama_quantize(plan: Plan, decoder: Decoder, file: str | Path) -> None:
    r"""Writes the types of all tensors as a file for ``llama-quantize --tensor-type-file``.

    One ``^blk\.3\.attn_q\.weight$=q8_0`` a line: llama-quantize searches each tensor's name for these as regular
    expressions, and takes the first that is found. It looks at them only where the type it is asked for is a quantized
    one, so that the command is ``llama-quantize --tensor-type-file FILE base.gguf out.gguf Q8_0``, with the base model
    as convert_hf_to_gguf.py writes it, in its own dtype. Every component has a line, and the embeddings and the head
    too, which no plan treats.

    The types: ``Int8`` and ``W8A8`` → q8_0, int8 with a scale for 32 weights; llama.cpp quantizes inputs too, in blocks
    of 32. ``Int4`` → q4_1: 16 values from the least to the greatest of 32 weights, as ``Int4`` takes them from its
    group, so that up to the float16 of its scales no step is wider than what was measured; q4_0, half a bit less, has
    its values around 0, where a group's need not lie. All else stays in the model's dtype. These are other grids than
    those that were measured: the GGUF's FDT is not the plan's.

    Args:
        plan: with no treatment but these; llama-quantize cannot prune.
        decoder: of the model that the plan was made for, of Llama's kind.
        file: written whole or not at all; one that is there is written over.

    Raises:
        InputError: the plan is for another model.
        ModelError: llama.cpp has no type for the model's dtype.
        ComponentError: a component has no name in llama.cpp that is known here.
        TreatmentError: llama-quantize has no such treatment, or K is no multiple of 32.
        RunError: the file cannot be written.

    Source: llama.cpp's ``tools/quantize/quantize.cpp`` (``parse_tensor_type_file``) and ``src/llama-quant.cpp``
    (``llama_tensor_get_type``), of 2026.
    """
    _write(Path(file), tensor_types(plan, decoder))


def tensor_types(plan: Plan, decoder: Decoder) -> str:
    """What ``export_llama_quantize`` writes; raises as it does."""
    plan.check(decoder)
    model = decoder.model
    if model.dtype not in _KEPT:
        raise ModelError(f"{type(model).__name__}: llama.cpp has no type for {model.dtype}")
    kept = _KEPT[model.dtype]
    names = ["token_embd.weight"]
    if not getattr(model.config, "tie_word_embeddings", False):
        names.append("output.weight")
    lines = [_line(name, kept) for name in names]
    for path, component in decoder.components.items():
        treatment = plan.configuration.get(path)
        lines.append(
            _line(_tensor_name(component), kept if treatment is None else _type_of(component, treatment))
        )
    return "\n".join(lines) + "\n"


def check_writable(file: str | Path) -> None:
    """Raise RunError where ``export_llama_quantize`` could not write this file, before anything else is written."""
    folder = os.path.dirname(file) or "."
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK | os.X_OK):
        raise RunError(f"{file}: cannot be written: {folder} is no folder to write to")
    if os.path.isdir(file):
        raise RunError(f"{file}: cannot be written: it is a folder")


def _line(name: str, kind: str) -> str:
    return f"^{re.escape(name)}$={kind}"


def _tensor_name(component: Component) -> str:
    """llama.cpp's name of it."""
    if component.name not in _TENSORS:
        raise ComponentError(
            f"{component.path}: not a name of Llama's kind, so that its name in llama.cpp is not known"
        )
    return f"blk.{component.layer}.{_TENSORS[component.name]}.weight"


def _type_of(component: Component, treatment: Treatment) -> str:
    # No subclasses: GPTQ's weights, say, are not what rounding gives.
    kind = {Int8: "q8_0", W8A8: "q8_0", Int4: "q4_1"}.get(type(treatment))
    if kind is None:
        raise TreatmentError(f"{component.path}: llama-quantize has nothing like {treatment.key}")
    if component.shape[1] % _BLOCK:
        raise TreatmentError(
            f"{component.path}: {kind} needs a K that is a multiple of {_BLOCK}, and K = {component.shape[1]}"
        )
    if isinstance(treatment, Int4) and treatment.group is not None and treatment.group % _BLOCK:
        raise TreatmentError(
            f"{component.path}: {treatment.key} has groups of {treatment.group}, and those of {kind}, of {_BLOCK}, "
            "would not lie within them"
        )
    return kind


def _write(file: Path, content: str) -> None:
    unfinished = file.with_name(f".unfinished-{file.name}")
    try:
        unfinished.write_text(content)
        os.replace(unfinished, file)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise RunError(f"{file}: cannot be written: {error.strerror}") from error
