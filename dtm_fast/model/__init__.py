"""A Hugging Face decoder as an ordered list of layers and components."""

from dtm_fast.model.calibration import Calibration
from dtm_fast.model.decoder import Component, Decoder, components
from dtm_fast.model.identity import model_identity, tokenizer_identity
from dtm_fast.model.input_statistics import InputStatistics
from dtm_fast.model.loading import load_model
from dtm_fast.model.soundness import check_eval_mode, check_vocabulary

__all__ = [
    "Calibration",
    "Component",
    "Decoder",
    "InputStatistics",
    "check_eval_mode",
    "check_vocabulary",
    "components",
    "load_model",
    "model_identity",
    "tokenizer_identity",
]
