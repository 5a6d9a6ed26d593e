"""The groups of a compressed-tensors config, read and looked into."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dtm_fast.export.forms import INT_QUANTIZED, MIXED, PACK_QUANTIZED

NAIVE_QUANTIZED = "naive-quantized"
_FORMATS = {
    "dense",
    INT_QUANTIZED,
    "float-quantized",
    NAIVE_QUANTIZED,
    PACK_QUANTIZED,
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
    "mxfp6-pack-quantized",
    "mxfp8-quantized",
    MIXED,
}


_TYPES = {
    "num_bits": (int,),
    "type": (str,),
    "symmetric": (bool,),
    "strategy": (str,),
    "group_size": (int,),
    "dynamic": (bool, str),
}


@dataclass(frozen=True)
class Arguments:
    """How a tensor is quantized; defaults are those of compressed-tensors."""

    num_bits: int = 8
    type: str = "int"
    symmetric: bool = True
    strategy: str = "tensor"
    group_size: int | None = None
    dynamic: bool | str = False

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> "Arguments":
        """What a config says of it; what this class does not name is left out. TypeError where it is no such value."""
        said = {name: given[name] for name in cls.__dataclass_fields__ if given.get(name) is not None}
        for name, value in said.items():
            if type(value) not in _TYPES[name]:
                raise TypeError(f"{name}: {value!r}")
        if "strategy" not in said:
            size = said.get("group_size")
            said["strategy"] = "tensor" if size is None else "channel" if size == -1 else "group"
        return cls(**said)


@dataclass(frozen=True)
class Group:
    """A config group: which modules it targets, and their scheme."""

    key: str
    targets: tuple[str, ...]
    format: str
    weights: Arguments | None
    inputs: Arguments | None

    @property
    def scheme(self) -> tuple[str, Arguments | None, Arguments | None]:
        """What the modules of one layer must have in common."""
        return self.format, self.weights, self.inputs

    @property
    def is_w8a8(self) -> bool:
        """int8 weights per channel and inputs per token, dynamically: what nn.Int8Linear computes."""
        return (
            self.format == INT_QUANTIZED
            and self.weights == Arguments(strategy="channel")
            and self.inputs == Arguments(strategy="token", dynamic=True)
        )

    @property
    def is_int8_weights(self) -> bool:
        """int8 weights per channel, and inputs as they are."""
        return (
            self.format in (PACK_QUANTIZED, NAIVE_QUANTIZED)
            and self.weights == Arguments(strategy="channel")
            and self.inputs is None
        )


def read_groups(config: Any) -> tuple[list[Group], list[str]]:
    """The groups of a ``quantization_config``, in the alphabetical order of their keys, and what is wrong with them."""
    if not isinstance(config, Mapping):
        return [], ["quantization_config is no mapping"]
    problems = []
    if config.get("quant_method") != "compressed-tensors":
        problems.append(f"quant_method is {config.get('quant_method')!r}, not 'compressed-tensors'")
    overall = config.get("format")
    if not isinstance(overall, str) or overall not in _FORMATS:
        problems.append(f"format {overall!r} is none of {', '.join(sorted(_FORMATS))}")
        overall = None
    if config.get("quantization_status") != "compressed":
        problems.append(f"quantization_status is {config.get('quantization_status')!r}, not 'compressed'")
    stored = config.get("config_groups")
    if not isinstance(stored, Mapping) or not stored:
        return [], [*problems, "config_groups: there are none"]
    if list(stored) != sorted(stored):
        problems.append(
            f"config_groups: {', '.join(stored)} are not in alphabetical order, in which other tools save them again "
            "and the first that matches counts"
        )
    groups = []
    for key in sorted(stored):
        try:
            group = _group(key, stored[key], overall)
        except (AttributeError, KeyError, TypeError, ValueError, re.error):
            problems.append(f"{key}: not a scheme with targets, weights and input_activations")
            continue
        groups.append(group)
        problems += _field_problems(group, stored[key].get("format"), overall)
    return groups, problems


def read_ignore(config: Any) -> tuple[list[str], list[str]]:
    """The names to ignore of a ``quantization_config``, and what is wrong with them."""
    ignore = config.get("ignore") or [] if isinstance(config, Mapping) else []
    try:
        if isinstance(ignore, str) or not all(isinstance(target, str) for target in ignore):
            raise TypeError("ignore")
        _compile(ignore)
    except (TypeError, re.error):
        return [], ["ignore: not a list of names and patterns"]
    return list(ignore), []


def _compile(targets: Iterable[str]) -> None:
    """Raises re.error if one of them is no pattern."""
    for target in targets:
        if target.startswith("re:"):
            re.compile(target[3:])


def _group(key: str, stored: Mapping[str, Any], overall: Any) -> Group:
    targets = stored["targets"]
    if not targets or isinstance(targets, str) or not all(isinstance(target, str) for target in targets):
        raise TypeError("targets")
    _compile(targets)
    weights, inputs = stored.get("weights"), stored.get("input_activations")
    return Group(
        key=key,
        targets=tuple(targets),
        format=stored.get("format") or overall,
        weights=None if weights is None else Arguments.of(weights),
        inputs=None if inputs is None else Arguments.of(inputs),
    )


def _field_problems(group: Group, own: Any, overall: Any) -> list[str]:
    """What vLLM would find no scheme for; of schemes with floats nothing is said."""
    if overall == MIXED and own is None:
        return [f"{group.key}: has no format of its own, and that of the whole is {MIXED}"]
    if overall != MIXED and own not in (None, overall):
        return [f"{group.key}: its format {own} is not that of the whole, {overall}; two need {MIXED}"]
    weights, inputs = group.weights, group.inputs
    if weights is None:
        return [f"{group.key}: quantizes no weights"]
    if weights.type != "int":
        return []
    if weights.dynamic:
        return [f"{group.key}: weights must be static"]
    if group.format == INT_QUANTIZED and inputs is None:
        return [f"{group.key}: {INT_QUANTIZED} needs input_activations; weights alone are {PACK_QUANTIZED}"]
    if group.format == NAIVE_QUANTIZED and inputs is None:
        return [
            f"{group.key}: vLLM has no scheme for int weights alone in {NAIVE_QUANTIZED}, but in {PACK_QUANTIZED}"
        ]
    if group.format == INT_QUANTIZED and not _is_int8_scheme(weights, inputs):
        return [
            f"{group.key}: {INT_QUANTIZED} must be symmetric int8 weights per channel or tensor, "
            "and int8 inputs per token, dynamic, or per tensor, static"
        ]
    if (
        group.format == PACK_QUANTIZED
        and inputs is None
        and (weights.num_bits not in (4, 8) or weights.strategy not in ("channel", "group"))
    ):
        return [f"{group.key}: {PACK_QUANTIZED} must be int4 or int8 weights per channel or group"]
    return []


def _is_int8_scheme(weights: Arguments, inputs: Arguments | None) -> bool:
    """Whether vLLM has int8 x int8 for it."""
    if inputs is None or weights.num_bits != 8 or inputs.num_bits != 8 or inputs.type != "int":
        return False
    strategy = ("token", True) if inputs.dynamic else ("tensor", False)
    return (
        weights.symmetric
        and weights.strategy in ("tensor", "channel")
        and (inputs.strategy, inputs.dynamic) == strategy
    )
