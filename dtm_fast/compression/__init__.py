"""The treatments, and how a configuration of them is put into a model."""

from dtm_fast.compression.applied import Change
from dtm_fast.compression.configuration import (
    Configuration,
    check_configuration,
    configuration_from_json,
    configuration_identity,
    configuration_to_json,
)
from dtm_fast.compression.size import configuration_bits, effective_bits
from dtm_fast.compression.treatments import W8A8, Int8, Prune, Treatment, parse_treatment

__all__ = [
    "W8A8",
    "Change",
    "Configuration",
    "Int8",
    "Prune",
    "Treatment",
    "check_configuration",
    "configuration_bits",
    "configuration_from_json",
    "configuration_identity",
    "configuration_to_json",
    "effective_bits",
    "parse_treatment",
]
