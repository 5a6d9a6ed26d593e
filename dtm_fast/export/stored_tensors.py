"""Whether the tensors of a checkpoint are those that its config groups say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from dtm_fast.export.checkpoint_files import Header, Headers
from dtm_fast.export.config_groups import Arguments, Group
from dtm_fast.export.forms import PACK_QUANTIZED

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FLOATS = ("F32", "BF16", "F16")
_QUANTIZED_NAMES = ("weight_scale", "weight_packed", "weight_zero_point", "weight_shape")


def tensor_problems(
    schemes: Mapping[str, Group], headers: Headers, shapes: Mapping[str, tuple[int, int]]
) -> list[str]:
    """One line for each linear module whose tensors do not fit its scheme, or that has none and is not dense.

    Args:
        schemes: module → its group.
        headers: of the checkpoint.
        shapes: module → (N, K), of all linear modules.
    """
    problems = []
    for module, shape in shapes.items():
        own = {
            name: headers[f"{module}.{name}"]
            for name in ("weight", *_QUANTIZED_NAMES)
            if f"{module}.{name}" in headers
        }
        group = schemes.get(module)
        if group is None:
            problem = _dense_problem(own, shape)
        elif group.weights is None or group.weights.type != "int":
            problem = None
        else:
            problem = _int_problem(own, shape, group, group.weights)
        if problem:
            problems.append(f"{module}: {problem}")
    return problems


def missing_tensors(model: PreTrainedModel, headers: Headers) -> list[str]:
    """One line if parameters of the model are neither stored, in any form, nor tied to others.

    Where a stored name is not the model's, transformers may translate it to one that is; then nothing is said.

    Args:
        model: may be on the meta device.
        headers: of the checkpoint.
    """
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    known = parameters | {name for name, _ in model.named_buffers()}
    stored = set()
    for name in headers:
        module, _, kind = name.rpartition(".")
        stored.add(f"{module}.weight" if kind in _QUANTIZED_NAMES else name)
    missing = sorted(parameters - stored - set(model.all_tied_weights_keys))
    if not missing or stored - known:
        return []
    return [f"{len(missing)} weights are missing, first: {missing[0]}"]


def _dense_problem(own: Mapping[str, Header], shape: tuple[int, int]) -> str | None:
    extra = [name for name in _QUANTIZED_NAMES if name in own]
    if extra:
        return f"has {', '.join(extra)}, and no config group targets it"
    weight = own.get("weight")
    if weight is None:  # tied, or under a name that transformers translates
        return None
    if weight.dtype not in _FLOATS:
        return f"its weight is {weight.dtype}, and no config group targets it"
    return None if weight.shape == shape else f"its weight is {list(weight.shape)}, not {list(shape)}"


def _int_problem(
    own: Mapping[str, Header], shape: tuple[int, int], group: Group, weights: Arguments
) -> str | None:
    n, k = shape
    if group.format == PACK_QUANTIZED:
        expected = {
            "weight_packed": ("I32", (n, -(-k * weights.num_bits // 32))),
            "weight_shape": ("I64", (2,)),
        }
    else:
        expected = {"weight": ("I8", shape)}
    for name, (dtype, size) in expected.items():
        if name not in own:
            return f"{group.key} targets it, and it has no {name}"
        if (own[name].dtype, own[name].shape) != (dtype, size):
            return f"its {name} is {own[name].dtype} {list(own[name].shape)}, not {dtype} {list(size)}"
    if "weight_scale" not in own:
        return f"{group.key} targets it, and it has no weight_scale"
    scale, sizes = own["weight_scale"], _scale_shapes(shape, weights)
    if scale.dtype not in _FLOATS:
        return f"its weight_scale is {scale.dtype}, not one of {', '.join(_FLOATS)}"
    if scale.shape not in sizes:
        return f"its weight_scale is {list(scale.shape)}, not {list(sizes[0])}"
    if weights.symmetric and "weight_zero_point" in own:
        return "has a weight_zero_point, which vLLM does not take of a symmetric scheme"
    if not weights.symmetric and "weight_zero_point" not in own:
        return f"{group.key} is not symmetric, and it has no weight_zero_point"
    return None


def _scale_shapes(shape: tuple[int, int], weights: Arguments) -> list[tuple[int, ...]]:
    """Those that a scale may have, the usual one first."""
    n, k = shape
    if weights.strategy == "channel":
        return [(n, 1)]
    if weights.strategy == "group" and weights.group_size:
        return [(n, -(-k // weights.group_size))]
    return [(1,), ()]
