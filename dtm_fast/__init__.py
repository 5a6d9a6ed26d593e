"""What compressing each part of a language model does to the text it writes, and the compression planned.

What a name needs is imported when it is first asked for: who wants the operations does not wait for transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dtm_fast.version import __version__

if TYPE_CHECKING:
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

_PACKAGES = ("compression", "export", "measure", "model", "nn", "ops", "plan", "report", "runs")
_MODULES = {
    **dict.fromkeys(
        ("Evaluator", "Measurement", "Probes", "ReferenceEvaluator", "read_documents"), "measure"
    ),
    **dict.fromkeys(("Calibration", "components", "load_model"), "model"),
    "backend_info": "ops",
}


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return import_module(f"dtm_fast.{name}")
    if name not in __all__:
        raise AttributeError(f"module 'dtm_fast' has no attribute {name!r}")
    found = getattr(import_module(f"dtm_fast.{_MODULES.get(name, 'compression')}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
