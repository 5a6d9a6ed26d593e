"""A plan as what others load: a Hugging Face checkpoint for transformers and vLLM, tensor types for llama.cpp."""

from dtm_fast.export.checkpoint import export_checkpoint
from dtm_fast.export.llama_quantize import export_llama_quantize
from dtm_fast.export.loading import load_export
from dtm_fast.export.validation import validate

__all__ = ["export_checkpoint", "export_llama_quantize", "load_export", "validate"]
