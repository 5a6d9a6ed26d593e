"""How a run was run: run.json, typed."""

from dataclasses import dataclass
from typing import Any

from dtm_fast.errors import InputError, RunError
from dtm_fast.measure import Floor
from dtm_fast.report.stored import entries, reading, text, whole
from dtm_fast.runs import RunDirectory


@dataclass(frozen=True)
class ListedComponent:
    """A component as run.json lists it: its path, layer, name inside the layer and shape [N, K]."""

    path: str
    layer: int
    name: str
    shape: tuple[int, int]

    @property
    def numel(self) -> int:
        """The number of its weights."""
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class Setting:
    """How the run was run: run.json, typed."""

    command: list[str]
    started: str
    model: str
    model_type: str
    dtype: str
    parameters: int
    text: str
    probes: int
    prefix: int
    completion: int
    floor: Floor
    components: dict[str, ListedComponent]
    machine: dict[str, Any]
    versions: dict[str, Any]

    @classmethod
    def read(cls, directory: RunDirectory) -> "Setting":
        """What run.json says.

        Raises:
            RunError: there is none, or it is not what it should be.
        """
        stored = directory.read_json("run.json")
        if stored is None:
            raise RunError(f"{directory.path}: nothing to report: there is no run.json")
        with reading(directory.path / "run.json", "the setting of a run"):
            model, probes = stored["model"], stored["probes"]
            return cls(
                command=[text(word) for word in entries(stored["command"])],
                started=text(stored["started"]),
                model=text(model["name"]),
                model_type=text(model["type"]),
                dtype=text(model["dtype"]),
                parameters=whole(model["parameters"]),
                text=text(probes["text"]),
                probes=whole(probes["count"], least=1),
                prefix=whole(probes["prefix"], least=1),
                completion=whole(probes["completion"], least=1),
                floor=Floor(**stored["floor"]),
                components={c["path"]: _component(c) for c in stored["components"]},
                machine=dict(stored["machine"]),
                versions=dict(stored["versions"]),
            )

    @property
    def layers(self) -> list[int]:
        """The layers that have components, in order."""
        return sorted({component.layer for component in self.components.values()})

    @property
    def names(self) -> list[str]:
        """The components' names inside their layers, in module order, each once."""
        names: list[str] = []
        place, layer = 0, -1
        for component in self.components.values():
            # Where layers differ, what an earlier layer lacks goes beside its neighbour in its own layer.
            place, layer = (place, layer) if component.layer == layer else (0, component.layer)
            if component.name not in names:
                names.insert(place, component.name)
            place = names.index(component.name) + 1
        return names

    @property
    def grid(self) -> list[list[ListedComponent | None]]:
        """The components by name and layer; None where a layer has none of that name."""
        at = {(c.name, c.layer): c for c in self.components.values()}
        return [[at.get((name, layer)) for layer in self.layers] for name in self.names]

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """The shape of every component."""
        return {path: component.shape for path, component in self.components.items()}

    @property
    def weights(self) -> int:
        """The number of weights of all components."""
        return sum(component.numel for component in self.components.values())


def _component(stored: dict[str, Any]) -> ListedComponent:
    shape = tuple(whole(size, least=1) for size in entries(stored["shape"]))
    if len(shape) != 2:
        raise InputError(f"{stored['path']} has the shape {list(shape)}, which is not [N, K]")
    return ListedComponent(text(stored["path"]), whole(stored["layer"]), text(stored["name"]), shape)
