"""Table (e): pruning, quantizing or keeping each component, beside pruning alone and int8 alone at the same size."""

from dataclasses import asdict
from typing import Any

import dtm_fast as dtm
from benchmarks.paper_tables.laboratory import Laboratory
from dtm_fast.compression import Treatment
from dtm_fast.errors import InputError
from dtm_fast.plan import Point, joint_search

_PRUNES = tuple(dtm.Prune(share) for share in (0.3, 0.5, 0.7))
FAMILIES: dict[str, tuple[Treatment, ...]] = {
    "joint": (dtm.Int8(), dtm.Int4(64), *_PRUNES),
    "int8 alone": (dtm.Int8(),),
    "int4 alone": (dtm.Int4(64),),
    "pruning alone": _PRUNES,
}


def joint(lab: Laboratory) -> list[dict[str, Any]]:
    """For each family and budget what the same search reaches: found on some probes, confirmed and judged on others."""
    rows = []
    for family, treatments in FAMILIES.items():
        for budget in lab.scale.budgets:
            try:
                plan = joint_search(
                    lab.choosing,
                    treatments,
                    [(path,) for path in lab.paths],
                    [budget],
                    refinements=lab.scale.refinements,
                    confirming=lab.confirming,
                )
            except InputError as error:
                rows.append({"name": family, "budget": budget, "why_not": str(error)})
                continue
            (row,) = lab.judged({family: plan.configuration})
            (chosen,) = lab.choosing.measure([plan.configuration], ("dppl", "sdt"))
            (confirmed,) = lab.confirming.measure([plan.configuration], ("dppl", "sdt"))
            points = {"choosing": chosen, "confirming": confirmed}
            seen = {name: asdict(Point.of(lab.decoder, found)) for name, found in points.items()}
            rows.append(row | {"budget": budget} | seen)
    return rows
