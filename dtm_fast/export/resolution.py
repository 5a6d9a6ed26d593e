"""Which config group each module of a checkpoint is in, and where readers would not agree on that."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from dtm_fast.export.config_groups import Group
from dtm_fast.export.served_layers import (
    ServedLayer,
    class_matches,
    name_matches,
    served_layers,
    shards_ignored,
)


@dataclass(frozen=True)
class Resolution:
    """What a config makes of the linear modules of a model.

    Attributes:
        schemes: module → its group; those that are ignored or that nothing targets are not in it.
        overlaps: a line for each module that several groups target.
        torn: a line for each layer of vLLM of whose modules not all have the same scheme.
    """

    schemes: dict[str, Group]
    overlaps: list[str]
    torn: list[str]


def resolve(groups: Sequence[Group], ignore: Sequence[str], linears: Iterable[str]) -> Resolution:
    """Looks for the group of every module: by its name, by the name of vLLM's layer that holds it, by the class.

    Args:
        groups: in the order in which they count.
        ignore: names, or patterns behind ``re:``.
        linears: all linear modules of the model.
    """
    found = Resolution({}, [], [])
    for layer in served_layers(linears):
        ignored = shards_ignored(layer, ignore)
        said = dict.fromkeys(layer.shards, "ignored")
        for shard in layer.shards:
            if shard in ignored:
                continue
            matching = _groups_of(shard, layer, groups)
            if len(matching) > 1:
                found.overlaps.append(_overlap(shard, matching))
            if matching:
                found.schemes[shard] = matching[0]
            said[shard] = f"in {matching[0].key}" if matching else "not targeted"
        if (
            len({found.schemes[shard].scheme if shard in found.schemes else None for shard in layer.shards})
            > 1
        ):
            found.torn.append(torn_layer(layer, said))
    return found


def torn_layer(layer: ServedLayer, said: Mapping[str, str]) -> str:
    """The line for a layer whose shards are not all alike; ``said`` is shard → what it is."""
    parts = ", ".join(f"{shard.rpartition('.')[2]} is {said[shard]}" for shard in layer.shards)
    return f"{layer.name}: vLLM multiplies by its parts as one matrix and needs one scheme for all: {parts}"


def _groups_of(shard: str, layer: ServedLayer, groups: Sequence[Group]) -> list[Group]:
    """All that target it, first those that name it."""
    by_name = [group for group in groups if any(name_matches(shard, target) for target in group.targets)]
    by_layer = [
        group for group in groups if any(name_matches(layer.name, target) for target in group.targets)
    ]
    by_class = [
        group for group in groups if any(class_matches(layer.class_name, target) for target in group.targets)
    ]
    keys = dict.fromkeys(group.key for group in (*by_name, *by_layer, *by_class))
    return [next(group for group in groups if group.key == key) for key in keys]


def _overlap(shard: str, matching: Sequence[Group]) -> str:
    keys = " and ".join(sorted(group.key for group in matching))
    return f"{shard}: targeted by {keys}; which of them counts, readers need not agree on"
