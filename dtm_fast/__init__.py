"""What compressing each part of a language model does to the text it writes, and the compression planned."""

from dtm_fast import nn, ops
from dtm_fast.compression import W8A8, Int8, Prune, Treatment, parse_treatment
from dtm_fast.measure import Evaluator, Measurement, Probes, ReferenceEvaluator, read_documents
from dtm_fast.model import components, load_model
from dtm_fast.ops import backend_info
from dtm_fast.version import __version__

__all__ = [
    "W8A8",
    "Evaluator",
    "Int8",
    "Measurement",
    "Probes",
    "Prune",
    "ReferenceEvaluator",
    "Treatment",
    "__version__",
    "backend_info",
    "components",
    "load_model",
    "nn",
    "ops",
    "parse_treatment",
    "read_documents",
]
