"""What compressing each part of a language model does to the text it writes, and the compression planned."""

from dtm_fast import nn, ops
from dtm_fast.compression import (
    GPTQ,
    W8A8,
    Drop,
    Int4,
    Int8,
    LLMInt8,
    Prune,
    SparseGPT,
    Treatment,
    accelerate,
    parse_treatment,
    restore,
)
from dtm_fast.measure import Evaluator, Measurement, Probes, ReferenceEvaluator, read_documents
from dtm_fast.model import Calibration, components, load_model
from dtm_fast.ops import backend_info
from dtm_fast.version import __version__

__all__ = [
    "GPTQ",
    "W8A8",
    "Calibration",
    "Drop",
    "Evaluator",
    "Int4",
    "Int8",
    "LLMInt8",
    "Measurement",
    "Probes",
    "Prune",
    "ReferenceEvaluator",
    "SparseGPT",
    "Treatment",
    "__version__",
    "accelerate",
    "backend_info",
    "components",
    "load_model",
    "nn",
    "ops",
    "parse_treatment",
    "read_documents",
    "restore",
]
