"""The treatments, and how a configuration of them is put into a model."""

from dtm_fast.compression.accelerated import Accelerated, accelerate, restore
from dtm_fast.compression.applied import Change
from dtm_fast.compression.configuration import (
    Configuration,
    Name,
    check_configuration,
    check_origin,
    configuration_from_json,
    configuration_identity,
    configuration_to_json,
    name_of,
)
from dtm_fast.compression.gptq import GPTQ
from dtm_fast.compression.int4 import Int4
from dtm_fast.compression.int8 import W8A8, Int8, LLMInt8
from dtm_fast.compression.kept_weights import compressed_weight
from dtm_fast.compression.parsing import parse_treatment
from dtm_fast.compression.pruning import Drop, Prune
from dtm_fast.compression.recovery import Recovered, recover
from dtm_fast.compression.recovery_settings import Recovery
from dtm_fast.compression.size import Shapes, configuration_bits, effective_bits, shapes_of
from dtm_fast.compression.sparsegpt import SparseGPT
from dtm_fast.compression.training_text import blocks_of
from dtm_fast.compression.treatment import Treatment, key_of

__all__ = [
    "GPTQ",
    "W8A8",
    "Accelerated",
    "Change",
    "Configuration",
    "Drop",
    "Int4",
    "Int8",
    "LLMInt8",
    "Name",
    "Prune",
    "Recovered",
    "Recovery",
    "Shapes",
    "SparseGPT",
    "Treatment",
    "accelerate",
    "blocks_of",
    "check_configuration",
    "check_origin",
    "compressed_weight",
    "configuration_bits",
    "configuration_from_json",
    "configuration_identity",
    "configuration_to_json",
    "effective_bits",
    "key_of",
    "name_of",
    "parse_treatment",
    "recover",
    "restore",
    "shapes_of",
]
