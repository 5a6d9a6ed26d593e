"""An exported checkpoint back on this package's kernels."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dtm_fast.compression import Configuration
from dtm_fast.compression.break_even import faster_layer
from dtm_fast.errors import ModelError
from dtm_fast.export.checkpoint import PLAN
from dtm_fast.export.checkpoint_files import read_headers, read_tensors
from dtm_fast.export.config_groups import Group, read_groups, read_ignore
from dtm_fast.export.forms import form_of, prunes, unpack
from dtm_fast.export.masks import check_mask, read_masks
from dtm_fast.export.resolution import resolve
from dtm_fast.export.skeleton import linear_shapes, read_skeleton
from dtm_fast.export.stored_tensors import tensor_problems
from dtm_fast.model import Decoder, check_vocabulary
from dtm_fast.model.soundness import check_complete, check_finite, first_line
from dtm_fast.nn import Int8Linear, SparseLinear
from dtm_fast.ops import large_pages
from dtm_fast.plan import Plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_KERNEL_DTYPES = (torch.float32, torch.bfloat16)


def load_export(
    folder: str | Path, dtype: torch.dtype | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a folder of ``export_checkpoint`` in eval mode, on the CPU, with its tokenizer.

    What is int-quantized becomes ``nn.Int8Linear``, the very numbers of the file, and multiplies int8 by int8; what is
    pruned becomes ``nn.SparseLinear`` where that is faster, as ``accelerate`` decides; the rest is dense. Another's
    folder loads as well if all that is quantized in it is int8: per channel, with inputs per token and dynamic, or
    weights alone.

    Args:
        folder: with safetensors, config and tokenizer.
        dtype: of what is not int8; None keeps the checkpoint's own.

    Raises:
        ModelError: one line that names what was wrong: a file that is missing or truncated, a form or scheme that
            this package has no kernel for, a mask that disagrees with the zeros, a tensor of another shape, a config
            that is not the plan's.
    """
    from transformers import AutoTokenizer

    folder = Path(folder)
    config, skeleton = read_skeleton(folder)
    headers = read_headers(folder)
    shapes = linear_shapes(skeleton)
    schemes, problems = _schemes(getattr(config, "quantization_config", None), shapes)
    problems += tensor_problems(schemes, headers, shapes)
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ModelError(f"{folder}: {problems[0]}{more}")
    masks = read_masks(folder)
    _check_plan(folder, schemes, masks)
    chosen: Any = dtype or config.dtype or torch.float32
    int8_layers = [path for path, group in schemes.items() if group.is_w8a8]
    if int8_layers and chosen not in _KERNEL_DTYPES:
        raise ModelError(
            f"{folder}: int8 layers take float32 and bfloat16, not {chosen}: name one with dtype"
        )

    tensors = read_tensors(headers)
    exact = all(tensors[name].dtype == chosen for path in masks if (name := f"{path}.weight") in tensors)
    quantized = {path: _quantized(folder, tensors, path, shapes[path]) for path in schemes}
    for path, (weight, scale) in quantized.items():
        tensors[f"{path}.weight"] = (weight.float() * scale).to(chosen)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = _dense(folder, type(skeleton), config, tensors, chosen)
    del tensors
    for path in int8_layers:
        linear = model.get_submodule(path)
        assert isinstance(linear, nn.Linear)
        model.set_submodule(path, _int8_linear(linear, *quantized[path]))
    _put_masks(folder, model, masks, exact)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise ModelError(f"{folder}: no usable tokenizer: {first_line(error)}") from error
    check_vocabulary(model, tokenizer, folder)
    return model.eval(), tokenizer


def _schemes(stored: Any, linears: Iterable[str]) -> tuple[dict[str, Group], list[str]]:
    """Module → its group, and what of the config this package cannot read."""
    if stored is None:
        return {}, []
    groups, problems = read_groups(stored)
    ignore, ignore_problems = read_ignore(stored)
    problems += ignore_problems
    problems += [
        f"{name}: does something else than to quantize weights and inputs, which load_export does not know"
        for name in ("kv_cache_scheme", "transform_config")
        if isinstance(stored, dict) and stored.get(name)
    ]
    for group in groups:
        if not group.is_w8a8 and not group.is_int8_weights:
            problems.append(
                f"{group.key}: load_export reads int8 weights per channel, alone or with dynamic int8 inputs per "
                "token; transformers loads this with compressed-tensors"
            )
    found = resolve(groups, ignore, linears)
    return found.schemes, problems + found.overlaps


def _check_plan(folder: Path, schemes: dict[str, Group], masks: dict[str, Tensor]) -> None:
    """The plan in the folder, if there is one, is what the config and the masks say."""
    if not (folder / PLAN).is_file():
        return
    try:
        configuration: Configuration = Plan.read(folder / PLAN).configuration
    except ValueError as error:
        raise ModelError(str(error)) from error
    planned = {path: form_of(treatment) for path, treatment in configuration.items() if form_of(treatment)}
    there = {path: group.format for path, group in schemes.items()}
    for path in sorted(planned.keys() | there.keys()):
        if planned.get(path) != there.get(path):
            raise ModelError(
                f"{folder}: {path} is {planned.get(path, 'dense')} in {PLAN} and {there.get(path, 'dense')} in "
                "config.json"
            )
    pruned = {path for path, treatment in configuration.items() if prunes(treatment)}
    for path in sorted(pruned ^ masks.keys()):
        raise ModelError(
            f"{folder}: {path} has {'a' if path in masks else 'no'} mask, and {PLAN} says otherwise"
        )


def _quantized(
    folder: Path, tensors: dict[str, Tensor], path: str, shape: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Takes weight, int8 [N, K], and scale, float32 [N, 1], out of the tensors."""
    packed, said = tensors.pop(f"{path}.weight_packed", None), tensors.pop(f"{path}.weight_shape", None)
    if said is not None and said.tolist() != list(shape):
        raise ModelError(f"{folder}: {path}: its weight_shape says {said.tolist()}, not {list(shape)}")
    weight = tensors.pop(f"{path}.weight") if packed is None else unpack(packed, shape[1])
    scale = tensors.pop(f"{path}.weight_scale").float()
    if not bool(scale.isfinite().all()):
        raise ModelError(f"{folder}: {path}: its weight_scale holds values that are NaN or infinite")
    return weight, scale


def _dense(
    folder: Path, kind: type[PreTrainedModel], config: Any, tensors: dict[str, Tensor], dtype: torch.dtype
) -> PreTrainedModel:
    """The model with all weights dense."""
    from transformers import GenerationConfig

    try:
        loaded: Any = kind.from_pretrained(
            None, config=config, state_dict=tensors, dtype=dtype, output_loading_info=True
        )
    except Exception as error:
        raise ModelError(f"{folder}: the weights cannot be loaded: {first_line(error)}") from error
    model: PreTrainedModel = loaded[0]
    check_complete(folder, loaded[1])
    check_finite(folder, model)
    if (folder / "generation_config.json").is_file():
        try:
            model.generation_config = GenerationConfig.from_pretrained(folder)
        except Exception as error:
            raise ModelError(f"{folder}: no usable generation_config.json: {first_line(error)}") from error
    return model


def _int8_linear(linear: nn.Linear, weight: Tensor, scale: Tensor) -> Int8Linear:
    """The layer of these numbers, with the bias and the mode of ``linear``."""
    layer = Int8Linear(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
    bias = {} if linear.bias is None else {"bias": linear.bias.detach()}
    tensors = {"weight": large_pages.moved(weight), "weight_scale": scale, **bias}
    layer.load_state_dict(tensors, assign=True)
    return layer.train(linear.training)


def _put_masks(folder: Path, model: PreTrainedModel, masks: dict[str, Tensor], exact: bool) -> None:
    """Checks each mask, and puts a sparse layer where it is faster; ``exact`` unless weights were cast."""
    if not masks:
        return
    decoder = Decoder.of(model)
    for path, mask in masks.items():
        if path not in decoder.components:
            raise ModelError(
                f"{folder}: there is a mask of {path}, which the model has not as a dense component"
            )
        component = decoder.components[path]
        problem = check_mask(mask, component.weight, exact)
        if problem is not None:
            raise ModelError(f"{folder}: {path}: {problem}")
        kind, _ = faster_layer(component.weight)
        if isinstance(component.module, nn.Linear) and kind is SparseLinear:
            model.set_submodule(path, SparseLinear.from_linear(component.module, mask))
