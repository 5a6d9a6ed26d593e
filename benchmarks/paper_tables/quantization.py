"""Tables (a) and (b): which components to quantize, chosen by each criterion, as many each time."""

from typing import Any

import dtm_fast as dtm
from benchmarks.paper_tables.laboratory import METRICS, Laboratory
from dtm_fast.compression import Treatment
from dtm_fast.plan import beam_search
from dtm_fast.plan.harms import MEASURED, PREDICTED
from dtm_fast.plan.ranking import rank

# The names of the criteria in the tables: the paper's three first, then what else the field chooses by.
_ORDERS = {"perplexity": "perplexity", "DPPL": "dppl", "FDT": "fdt75", "KL": "kl"}


def absmax(lab: Laboratory) -> list[dict[str, Any]]:
    """(a) AbsMax int8 of weights and activations, beside LLM.int8() everywhere."""
    treatment = dtm.W8A8()
    named = _by_order(lab, treatment, lab.scale.converted)
    if lab.scale.absmax_beam:
        width, among = lab.scale.absmax_beam
        found = _beam(lab, treatment, lab.scale.converted, width, among)
        named[f"{lab.scale.converted} by FDT, beam"] = found
    everywhere = lab.paths
    named["all, AbsMax"] = dict.fromkeys(everywhere, treatment)
    named["all, LLM.int8()"] = dict.fromkeys(everywhere, dtm.LLMInt8())
    named["all, int8 weights only"] = dict.fromkeys(everywhere, dtm.Int8())
    return lab.judged({"base": {}, **named})


def gptq(lab: Laboratory) -> list[dict[str, Any]]:
    """(b) GPTQ int4 of a few components, beside round-to-nearest and all."""
    treatment, size = dtm.GPTQ(64), lab.scale.int4
    named = _by_order(lab, treatment, size)
    for label, by in (("perplexity", "perplexity"), ("DPPL", "dppl"), ("FDT", "fdt75")):
        named[f"{size} by {label}, beam"] = _beam(lab, treatment, size, *lab.scale.beam, by)
    everywhere = lab.paths
    named["all, GPTQ"] = dict.fromkeys(everywhere, treatment)
    named["all, round to nearest"] = dict.fromkeys(everywhere, dtm.Int4(64))
    return lab.judged({"base": {}, **named})


def _beam(
    lab: Laboratory, treatment: Treatment, size: int, width: int, among: int, by: str = "fdt75"
) -> dict[str, Treatment]:
    units = [(path,) for path in lab.paths]
    return beam_search(
        lab.choosing, [treatment], size, width=width, by=by, units=units, among=among
    ).configuration


def _by_order(lab: Laboratory, treatment: Treatment, size: int) -> dict[str, dict[str, Treatment]]:
    """The least harmful alone by each criterion."""
    alone = lab.choosing.measure([{path: treatment} for path in lab.paths], METRICS)
    measured = dict(zip(lab.paths, alone, strict=True))
    named = {
        f"{size} by {label}": dict.fromkeys(rank(measured, by)[:size], treatment)
        for label, by in _ORDERS.items()
    }
    named[f"{size} by SDT"] = dict.fromkeys(
        sorted(measured, key=lambda path: (MEASURED["sdt"].of(measured[path]), path))[:size], treatment
    )
    for label, harm in PREDICTED.items():
        predicted = harm(lab.choosing, treatment, lab.paths)
        order = sorted(lab.paths, key=lambda path: (predicted[path], path))
        named[f"{size} by {label}"] = dict.fromkeys(order[:size], treatment)
    return named
