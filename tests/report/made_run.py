"""Made-up runs: real run directories with measurements that nobody measured."""

from collections.abc import Sequence
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Any

import torch

from dtm_fast.compression import Configuration, Int8, Treatment, configuration_identity, effective_bits
from dtm_fast.measure import Measurement
from dtm_fast.plan import Plan, Point, Stop
from dtm_fast.runs import RunDirectory

N = 40
NAMES = ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")
LAYERS = 4


def path_of(layer: int, name: str) -> str:
    return f"model.layers.{layer}.{name}"


def components(names: Sequence[str] = NAMES, layers: int = LAYERS) -> list[dict[str, Any]]:
    return [
        {"path": path_of(layer, name), "layer": layer, "name": name, "shape": [10, 10 * (place + 1)]}
        for layer in range(layers)
        for place, name in enumerate(names)
    ]


def make_run(
    path: Path, listed: list[dict[str, Any]] | None = None, model: str = "made-model"
) -> RunDirectory:
    """A run directory with run.json and an empty journal."""
    directory = RunDirectory.resume(path, {"model": "made", "probes": "made"})
    directory.write_json(
        "run.json",
        {
            "command": ["dtm-fast", "plan", model, "--run", "a b"],
            "started": "2026-01-02T03:04:05+00:00",
            "model": {"name": model, "type": "MadeForCausalLM", "dtype": "float32", "parameters": 123456},
            "probes": {"text": "pydoc", "count": 4, "prefix": 16, "completion": N},
            "floor": {
                "divergent": 0,
                "positions": 160,
                "margin": 0.01,
                "batch_size": 4,
                "other_batch_size": 1,
                "corrected": 2,
            },
            "components": components() if listed is None else listed,
            "machine": {"cpu": "Made CPU", "isa": ["avx2", "avx512"]},
            "versions": {"dtm_fast": "0.1", "torch": "2.6"},
        },
    )
    return directory


def measured(configuration: Configuration, fdt: Sequence[int], **extra: Any) -> Measurement:
    """A measurement with these FDTs; each probe that diverges does so twice, the second by a tie."""
    first = torch.tensor(fdt)
    diverges = first < N
    margins = torch.where(diverges, torch.tensor([0.5, 0.001, 0.5, 0.5]), torch.nan)
    return Measurement(configuration, N, first, 2 * diverges.long(), margins, seconds=1.5, **extra)


def record(directory: RunDirectory, measurement: Measurement, metrics: Sequence[str] = ()) -> None:
    identity = configuration_identity(measurement.configuration)
    directory.journal.add(identity, list(metrics), measurement.to_json())


def fdt_of(place: int) -> list[int]:
    """Of the component at ``place``: the later, the more it harms; the first harms nothing."""
    return [N, N - place, N - 2 * place, N]


def dppl_of(harm: float) -> torch.Tensor:
    return torch.tensor([2.0, 2.5, 3.0, 3.5], dtype=torch.float64) + harm / 8


def sweep(directory: RunDirectory, paths: Sequence[str], treatment: Treatment) -> None:
    for place, path in enumerate(paths):
        record(directory, measured({path: treatment}, fdt_of(place), dppl=dppl_of(place)), ["dppl"])


def shapes_in(directory: RunDirectory) -> dict[str, tuple[int, int]]:
    """The shape of every component, as run.json lists them."""
    stored = directory.read_json("run.json")
    assert stored is not None
    return {component["path"]: tuple(component["shape"]) for component in stored["components"]}


def point_of(directory: RunDirectory, measurement: Measurement) -> Point:
    """As ``Point.of``, without a model."""
    shapes, configuration = shapes_in(directory), measurement.configuration
    fdt = measurement.summary("fdt")
    total = sum(map(prod, shapes.values()))
    return Point(
        components=len(configuration),
        share=sum(prod(shapes[path]) for path in configuration) / total,
        bits=effective_bits(shapes, configuration),
        fdt75=fdt.p75,
        fdt=fdt.mean,
        sdt=None if measurement.sdt is None else measurement.summary("sdt").mean,
        dppl=None if measurement.dppl is None else measurement.summary("dppl").mean,
    )


def write_plan(
    directory: RunDirectory, order: list[str], sizes: Sequence[int], chosen: int, **stop: Any
) -> None:
    """Joint int8 measurements of ``sizes`` and a plan of the first ``chosen`` of ``order``."""
    points = {}
    for size in sizes:
        joint = measured(
            dict.fromkeys(order[:size], Int8()), [N - size, N - 2 * size, N - size, N], dppl=dppl_of(size)
        )
        record(directory, joint, ["dppl"])
        points[size] = point_of(directory, joint)
    plan = Plan(
        configuration=dict.fromkeys(order[:chosen], Int8()),
        search="in order",
        how={"treatment": "int8", "ranked_by": "fdt75", "order": order, "stop": asdict(Stop(**stop))},
        curve=[points[size] for size in sorted(points)],
        chosen=points.get(chosen),
    )
    directory.write_json("plan.json", plan.to_json())
