"""What choosing by FDT buys: comparison.json, typed and checked."""

from dataclasses import dataclass
from typing import Any

from dtm_fast.compression import effective_bits
from dtm_fast.errors import InputError
from dtm_fast.measure import EXTRA_METRICS, Measurement
from dtm_fast.report.setting import Setting
from dtm_fast.report.stored import entries, finite, reading, text, values_in
from dtm_fast.runs import RunDirectory

FILE = "comparison.json"


@dataclass(frozen=True)
class Chosen:
    """What a criterion chose within a budget (effective bits), the effective bits of that, and what it does."""

    budget: float
    bits: float
    measurement: Measurement


@dataclass(frozen=True)
class Comparison:
    """Criteria beside each other.

    Attributes:
        treatments: what could be chosen.
        chosen: criterion → its choices, the smallest first.
    """

    treatments: list[str]
    chosen: dict[str, list[Chosen]]

    @classmethod
    def read(cls, directory: RunDirectory, setting: Setting) -> "Comparison | None":
        """The comparison in a run directory; None where there is none.

        Raises:
            RunError: it is not what it should be.
        """
        if not (directory.path / FILE).exists():
            return None
        with reading(directory.path / FILE, "a comparison"):
            stored = values_in(directory, FILE)
            found: dict[str, list[Chosen]] = {}
            for row in entries(stored["rows"]):
                found.setdefault(text(row["by"]), []).append(_chosen(row, setting))
            if not found:
                raise InputError("it has no rows")
            for choices in found.values():
                choices.sort(key=lambda each: (each.bits, each.budget))
            return cls(list(map(text, entries(stored["treatments"]))), found)


def _chosen(row: dict[str, Any], setting: Setting) -> Chosen:
    measurement = Measurement.from_json(row)
    for path in measurement.configuration:
        if path not in setting.components:
            raise InputError(f"{path!r} is none of the components in run.json")
    fdt, n = measurement.fdt, setting.completion
    if measurement.completion != n:
        raise InputError(f"a row is of {measurement.completion!r} tokens, the run of {n}")
    for metric in ("fdt", "sdt", *EXTRA_METRICS):
        values = getattr(measurement, metric)
        if values is not None and tuple(values.shape) != (setting.probes,):
            raise InputError(
                f"the {metric} of a row is of {list(values.shape)} probes, the run of {setting.probes}"
            )
    if not bool(((fdt >= 0) & (fdt <= n)).all()):
        raise InputError(f"an FDT does not lie in 0 … {n}")
    bits = effective_bits(setting.shapes, measurement.configuration)
    return Chosen(finite(row["budget"]), bits, measurement)
