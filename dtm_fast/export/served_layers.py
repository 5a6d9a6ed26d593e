"""The linear layers as vLLM has them: what it multiplies by as one matrix, and which config group it finds for each.

Read off vLLM's ``compressed_tensors/utils.py`` (``should_ignore_layer``, ``find_matched_target``) and
``compressed_tensors.py`` (``get_scheme_dict``), of September 2026.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dtm_fast.plan.units import FUSED

_CLASSES = {
    "qkv_proj": "QKVParallelLinear",
    "gate_up_proj": "MergedColumnParallelLinear",
    "o_proj": "RowParallelLinear",
    "down_proj": "RowParallelLinear",
    "lm_head": "ParallelLMHead",
}


@dataclass(frozen=True)
class ServedLayer:
    """A linear layer as vLLM has it.

    Attributes:
        name: its path there, such as ``model.layers.0.self_attn.qkv_proj``.
        shards: the checkpoint's modules in it; one that is called ``name`` where nothing is fused.
    """

    name: str
    shards: tuple[str, ...]

    @property
    def class_name(self) -> str:
        """Of vLLM's class; it matters by what it contains."""
        return _CLASSES.get(self.name.rpartition(".")[2], "ColumnParallelLinear")


def served_layers(linears: Iterable[str]) -> list[ServedLayer]:
    """The layers that these linear modules of a checkpoint become; each module is in one.

    Args:
        linears: module paths. Modules of ``FUSED`` that stand beside all others of their set are fused.
    """
    known = dict.fromkeys(linears)
    found: dict[str, ServedLayer] = {}
    for path in known:
        parent, dot, own = path.rpartition(".")
        for fused, names in FUSED.items():
            shards = tuple(f"{parent}{dot}{name}" for name in names)
            if own in names and all(shard in known for shard in shards):
                found.setdefault(f"{parent}{dot}{fused}", ServedLayer(f"{parent}{dot}{fused}", shards))
                break
        else:
            found[path] = ServedLayer(path, (path,))
    return list(found.values())


def name_matches(name: str, target: str) -> bool:
    """``target`` is the name, or after ``re:`` a pattern that matches it from its start."""
    return bool(re.match(target[3:], name)) if target.startswith("re:") else target == name


def class_matches(class_name: str, target: str) -> bool:
    """``target`` is contained in the class's name, whatever its case; or after ``re:`` matches it from its start."""
    if target.startswith("re:"):
        return bool(re.match(target[3:], class_name))
    return target.lower() in class_name.lower()


def shards_ignored(layer: ServedLayer, ignore: Sequence[str]) -> list[str]:
    """The shards that ``ignore`` names. vLLM refuses a layer of which it names some and not all."""
    if layer.name in ignore:
        return list(layer.shards)
    return [shard for shard in layer.shards if any(name_matches(shard, target) for target in ignore)]
