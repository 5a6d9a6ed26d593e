"""Made-up results of each search, of a comparison and of trainings, written into made-up runs."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import accumulate
from math import prod
from typing import Any

from made_run import N, dppl_of, fdt_of, measured, point_of, record, shapes_in

from dtm_fast.compression import Configuration, Int4, Int8, Prune, Treatment
from dtm_fast.measure import Measurement
from dtm_fast.plan import Plan
from dtm_fast.runs import RunDirectory

SPARSITIES = (0.2, 0.6, 1.0)
"""What ``write_rounds`` prunes the components of each layer to, by their places in it, after its last round."""


def harmed(configuration: Configuration, harm: float) -> Measurement:
    """A measurement whose FDT falls by about ``harm`` tokens, on no probe below 0."""
    steps = (harm * 0.5, harm, harm * 1.5, harm * 0.25)
    return measured(configuration, [max(0, N - round(step)) for step in steps], dppl=dppl_of(harm))


def without(measurement: Measurement, *metrics: str) -> Measurement:
    return replace(measurement, **dict.fromkeys(metrics))


def write_rounds(directory: RunDirectory, shares: Sequence[float] = (0.5, 0.75, 1.0)) -> Plan:
    """Rounds to these shares of ``SPARSITIES``; what each probes is in the journal, by FDT alone."""
    shapes = shapes_in(directory)
    final = {path: SPARSITIES[place % 3] for place, path in enumerate(shapes)}
    for place, path in enumerate(shapes):
        record(directory, without(measured({path: Prune(0.3)}, fdt_of(place)), "sdt"))
    rounds: list[dict[str, Any]] = []
    curve = []
    current, before = dict.fromkeys(shapes, 0.0), 0.0
    for place, share in enumerate(shares):
        after = {path: round(share * sparsity, 4) for path, sparsity in final.items()}
        dropped = sum(after[path] * prod(shape) for path, shape in shapes.items())
        mean = dropped / sum(map(prod, shapes.values()))
        joint = harmed({path: Prune(each) for path, each in after.items()}, 9 * (place + 1))
        record(directory, joint, ["dppl"])
        curve.append(point_of(directory, joint))
        rounds.append(
            {
                "step": mean - before,
                "current": current,
                "points": {},
                "level": N - 3.0 * place - 2,
                "sparsities": after,
            }
        )
        current, before = after, mean
    plan = Plan(
        configuration=dict(joint.configuration),
        search="pruning rounds",
        how={"steps": [each["step"] for each in rounds], "rounds": rounds},
        curve=curve,
        chosen=curve[-1],
    )
    directory.write_json("plan.json", plan.to_json())
    return plan


def write_beam(directory: RunDirectory, treatments: Sequence[Treatment] = (Int8(),), depth: int = 8) -> Plan:
    """Single components by FDT alone, and the best of each depth; FDT_75 stays at N for the first two."""
    paths = list(shapes_in(directory))
    for treatment in treatments:
        for place, path in enumerate(paths):
            record(directory, without(measured({path: treatment}, fdt_of(place)), "sdt"))
    curve = []
    configuration: dict[str, Treatment] = {}
    for place in range(depth):
        configuration = {**configuration, paths[place]: treatments[place % len(treatments)]}
        joint = harmed(configuration, 2 * place + 1)
        if place < 2:
            joint = measured(configuration, [N, N, N - 2 * place - 2, N], dppl=dppl_of(place))
        record(directory, joint, ["dppl"])
        curve.append(point_of(directory, joint))
        # What was extended otherwise, and read to its end.
        record(directory, without(measured({**configuration, paths[-1]: Int8()}, [1, 2, 3, 4]), "sdt"))
    plan = Plan(
        configuration=configuration,
        search="beam",
        how={
            "treatments": [treatment.key for treatment in treatments],
            "depth": depth,
            "width": 3,
            "by": "fdt75",
            "among": 5,
            "units": [[path] for path in paths],
            "kept": [],
        },
        curve=curve,
        chosen=curve[-1],
    )
    directory.write_json("plan.json", plan.to_json())
    return plan


def write_joint(directory: RunDirectory) -> Plan:
    """A front of four points, the plan the second of them; beside it what it beats, two of that by FDT alone."""
    paths = list(shapes_in(directory))
    treatments = (Int8(), Int4(5), Prune(0.7))

    def mixed(count: int) -> dict[str, Treatment]:
        return {path: treatments[place % 3] for place, path in enumerate(paths[:count])}

    total = len(paths)
    front = [harmed(mixed(count), 3 * count * 8 / total) for count in (total, total - 2, total // 2, 2)]
    worse = [harmed(dict.fromkeys(paths[:count], Int8()), 5 * count * 8 / total) for count in range(2, total)]
    for measurement in (*front, *worse):
        record(directory, measurement, ["dppl"])
    for count in (3, 5):
        nearby = measured({**mixed(count), paths[count]: Prune(0.3)}, [30, 20, 10, 25])
        record(directory, without(nearby, "sdt"))
    curve = [point_of(directory, measurement) for measurement in front]
    other = point_of(directory, worse[0])
    plan = Plan(
        configuration=mixed(total - 2),
        search="joint",
        how={
            "treatments": [treatment.key for treatment in treatments],
            "budgets": [10.0, 15.5],
            "units": total,
            "refinements": 1,
            "confirmed_on": None,
            "reached": [asdict(curve[1]), asdict(other)],
        },
        curve=curve,
        chosen=curve[1],
    )
    directory.write_json("plan.json", plan.to_json())
    return plan


def comparison_rows(directory: RunDirectory) -> list[dict[str, Any]]:
    """Of three criteria at two budgets; the larger budget comes first, and each later criterion harms more."""
    paths = list(shapes_in(directory))
    rows = []
    for worse, by in enumerate(("kl", "fdt", "gradient")):
        for budget, count in ((15, len(paths) // 4), (9, 3 * len(paths) // 4)):
            configuration = dict.fromkeys(paths[worse : worse + count], Int8())
            measurement = harmed(configuration, (2 if by == "fdt" else 4 + 2 * worse) * 24 / budget)
            rows.append({"by": by, "budget": budget, **measurement.to_json()})
    return rows


def write_comparison(directory: RunDirectory) -> None:
    directory.write_json("comparison.json", {"treatments": ["int8"], "rows": comparison_rows(directory)})


def write_losses(directory: RunDirectory, folder: str, masked: int, losses: Sequence[float]) -> None:
    place = directory.path / folder
    place.mkdir(parents=True)
    (place / "losses.json").write_text(json.dumps({"masked": masked, "losses": list(losses)}))


def falling(steps: int, masked: int, start: float = 6.0) -> list[float]:
    """Losses that fall, and once more where the mask goes."""
    ratios = accumulate(range(steps), lambda loss, _: loss - 0.03 * (loss - 2.5), initial=start)
    return [loss - 0.2 * (step >= masked) for step, loss in enumerate(list(ratios)[:steps])]


def written(directory: RunDirectory, name: str, change: Mapping[str, Any]) -> None:
    """Writes a JSON file again with some of its values changed."""
    stored = directory.read_json(name)
    assert stored is not None
    (directory.path / name).write_text(json.dumps({**stored, **change}))
