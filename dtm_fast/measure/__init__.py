"""Probes, metrics and evaluators: what a configuration does to the text."""

from dtm_fast.measure.evaluator import Evaluator
from dtm_fast.measure.floor import Floor, self_divergence
from dtm_fast.measure.measurement import EXTRA_METRICS, Measurement
from dtm_fast.measure.probes import Probes
from dtm_fast.measure.prompts import DEFAULT_SOURCE, read_documents
from dtm_fast.measure.reference import ReferenceEvaluator
from dtm_fast.measure.statistics import Summary, summarize

__all__ = [
    "DEFAULT_SOURCE",
    "EXTRA_METRICS",
    "Evaluator",
    "Floor",
    "Measurement",
    "Probes",
    "ReferenceEvaluator",
    "Summary",
    "read_documents",
    "self_divergence",
    "summarize",
]
