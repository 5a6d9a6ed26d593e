"""Looks at an exported folder as vLLM does when it loads one, and says what it would trip over."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from dtm_fast.errors import ModelError
from dtm_fast.export.checkpoint_files import INDEX, read_headers, weight_files
from dtm_fast.export.config_groups import Group, read_groups, read_ignore
from dtm_fast.export.resolution import resolve
from dtm_fast.export.served_layers import class_matches, name_matches, served_layers
from dtm_fast.export.skeleton import linear_shapes, read_skeleton
from dtm_fast.export.stored_tensors import missing_tensors, tensor_problems


def validate(folder: str | Path) -> list[str]:
    """What vLLM would refuse in a Hugging Face folder, or load as something else than was meant.

    Nothing is loaded but the headers. It looks at the fields and schemes of the ``quantization_config``, at what its
    targets and ``ignore`` name, at the layers that vLLM holds as one matrix (q, k and v; gate and up), whose modules
    must share a scheme, at modules that two groups target, at the stored tensors' names, dtypes and shapes, at a
    ``sparsity_config``, and at other safetensors files beside the weights. Of schemes with floats it says nothing.

    Args:
        folder: of a causal language model, dense or in a form of compressed-tensors; need not be of ``dtm_fast``.

    Returns:
        One line for each problem, that names the place and the reason; empty where there is none.

    Source: vLLM's ``compressed_tensors.py`` and ``utils.py`` of September 2026.
    """
    folder = Path(folder)
    try:
        _, model = read_skeleton(folder)
        headers = read_headers(folder)
        problems = _strange_files(folder)
    except ModelError as error:
        return [str(error)]
    shapes = linear_shapes(model)
    stored = json.loads((folder / "config.json").read_text()).get("quantization_config")
    if stored is None:
        return problems + tensor_problems({}, headers, shapes) + missing_tensors(model, headers)
    groups, field_problems = read_groups(stored)
    ignore, ignore_problems = read_ignore(stored)
    problems += _sparsity_problems(stored) + field_problems + ignore_problems
    problems += _target_problems(groups, ignore, model, list(shapes))
    resolved = resolve(groups, ignore, shapes)
    problems += resolved.overlaps + resolved.torn
    return problems + tensor_problems(resolved.schemes, headers, shapes) + missing_tensors(model, headers)


def _strange_files(folder: Path) -> list[str]:
    known = set(weight_files(folder))
    others = sorted(file.name for file in folder.glob("*.safetensors") if file not in known)
    if others and not (folder / INDEX).is_file():
        return [f"{', '.join(others)}: without a {INDEX} vLLM reads every safetensors file for weights"]
    return []


def _sparsity_problems(stored: Any) -> list[str]:
    sparsity = stored.get("sparsity_config") if isinstance(stored, Mapping) else None
    if isinstance(sparsity, Mapping) and sparsity.get("targets"):
        return ["sparsity_config: has targets, which vLLM refuses, whatever their format (since 0.24)"]
    return []


def _target_problems(
    groups: Sequence[Group], ignore: Sequence[str], model: nn.Module, linears: Sequence[str]
) -> list[str]:
    """Targets, and names to ignore, that are not in the model."""
    layers = served_layers(linears)
    modules = {path for path, _ in model.named_modules()} | {layer.name for layer in layers}
    problems = []
    for group in groups:
        for target in group.targets:
            by_name = any(name_matches(path, target) for path in (*linears, *(each.name for each in layers)))
            if not by_name and not any(class_matches(each.class_name, target) for each in layers):
                problems.append(f"{group.key}: its target {target!r} is no linear module of the model")
    for target in ignore:
        by_name = any(name_matches(path, target) for path in modules)
        if not by_name and not any(type(module).__name__ == target for module in model.modules()):
            problems.append(f"ignore: {target!r} is no module of the model")
    return problems
