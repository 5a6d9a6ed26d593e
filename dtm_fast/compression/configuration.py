"""A configuration: which component gets which treatment; what it does not name stays as it is."""

import hashlib
import json
from collections.abc import Mapping
from typing import TypeAlias

from dtm_fast.compression.parsing import parse_treatment
from dtm_fast.compression.treatment import Treatment
from dtm_fast.errors import InputError, TreatmentError
from dtm_fast.model import Decoder, model_identity

Configuration: TypeAlias = Mapping[str, Treatment]

Name: TypeAlias = tuple[tuple[str, str], ...]
"""Component and treatment's key, sorted: what tells configurations apart, and decides between equals."""


def name_of(configuration: Configuration) -> Name:
    """Equal for equal configurations, whatever the order they were written in."""
    return tuple(sorted((path, treatment.key) for path, treatment in configuration.items()))


def check_configuration(decoder: Decoder, configuration: Configuration) -> None:
    """Raises ComponentError or TreatmentError if ``configuration`` does not fit ``decoder``."""
    if not isinstance(configuration, Mapping):
        raise TreatmentError(f"a configuration maps components to treatments; got {configuration!r}")
    for path, treatment in configuration.items():
        component = decoder.component(path)
        if not isinstance(treatment, Treatment):
            raise TreatmentError(f"{path}: {treatment!r} is not a treatment, such as dtm_fast.Int8()")
        treatment.check(component)


def check_origin(decoder: Decoder, configuration: Configuration, model: str, calibration: str) -> None:
    """Raises InputError if a configuration was measured with another model or calibration than the decoder's.

    Args:
        decoder: that it is to be applied to.
        configuration: fits the decoder.
        model: identity of the model that it was measured on; empty where that is not known.
        calibration: the same of the calibration; it matters if a treatment looks at inputs.
    """
    if model and model != (own := model_identity(decoder.model)):
        dtype = str(decoder.model.dtype).removeprefix("torch.")
        raise InputError(
            f"plan: made for another model ({model[:12]}…) than this one ({own[:12]}…, in {dtype}; in another dtype it "
            "is another model); its configuration alone can be given for any that has the components"
        )
    inputs_matter = any(treatment.needs_inputs for treatment in configuration.values())
    if inputs_matter and calibration and calibration != (own := decoder.calibration):
        raise InputError(
            f"plan: measured with another calibration ({calibration[:12]}…) than this one ({own[:12]}…): "
            "other text, or another count or length"
        )


def configuration_to_json(configuration: Configuration) -> dict[str, str]:
    """Component → the treatment's key, sorted by component: the form in journals and plans."""
    return {path: configuration[path].key for path in sorted(configuration)}


def configuration_from_json(stored: Mapping[str, str]) -> dict[str, Treatment]:
    """The inverse of ``configuration_to_json``."""
    return {path: parse_treatment(key) for path, key in stored.items()}


def configuration_identity(configuration: Configuration) -> str:
    """SHA-256 of the configuration, whatever the order it was written in; 64 hexadecimal digits."""
    return hashlib.sha256(json.dumps(configuration_to_json(configuration)).encode()).hexdigest()
