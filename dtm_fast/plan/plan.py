"""A plan: the configuration that a search chose, with how it was found and what it measured."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from dtm_fast.compression import (
    Configuration,
    Treatment,
    check_configuration,
    check_origin,
    configuration_from_json,
    configuration_to_json,
    effective_bits,
    shapes_of,
)
from dtm_fast.errors import InputError
from dtm_fast.measure import Measurement
from dtm_fast.model import Decoder

_FORMAT = 2


@dataclass(frozen=True)
class Point:
    """One joint configuration on the way: how much was compressed and what that did (means over probes).

    Attributes:
        components: how many are treated.
        share: theirs of the parameters of all components.
        bits: that a weight of a component takes on average, 16 if nothing is treated (``effective_bits``).
        fdt75: FDT_75.
        fdt: mean FDT.
        sdt: mean SDT; None where it was not measured.
        dppl: mean DPPL; None where it was not measured or is infinite.
    """

    components: int
    share: float
    bits: float
    fdt75: float
    fdt: float
    sdt: float | None
    dppl: float | None

    @classmethod
    def of(cls, decoder: Decoder, measurement: Measurement) -> "Point":
        """The point of a measurement's configuration."""
        fdt, configuration = measurement.summary("fdt"), measurement.configuration
        dppl = math.inf if measurement.dppl is None else measurement.summary("dppl").mean
        return cls(
            components=len(configuration),
            share=share_of(decoder, configuration),
            bits=effective_bits(shapes_of(decoder), configuration),
            fdt75=fdt.p75,
            fdt=fdt.mean,
            sdt=None if measurement.sdt is None else measurement.summary("sdt").mean,
            dppl=None if math.isinf(dppl) else dppl,
        )

    @classmethod
    def from_json(cls, stored: Any) -> "Point":
        """The inverse of ``asdict``; InputError if it is none."""
        names = {each.name for each in fields(cls)}
        if not isinstance(stored, Mapping) or stored.keys() != names:
            raise InputError(f"plan: a point has {', '.join(sorted(names))}; not {stored!r}")
        return cls(**stored)


@dataclass(frozen=True)
class Plan:
    """The configuration that a search chose, with how it was found and what it measured.

    Attributes:
        configuration: component → treatment.
        search: which search found it: ``"in order"``, ``"pruning rounds"``, ``"beam"`` or ``"joint"``.
        how: the search's arguments and what it decided on the way, as JSON values.
        model: identity of the model it is for (``model_identity``).
        calibration: identity of the calibration that it was measured with; empty if there was none.
        curve: joint configurations that were measured on the way, in the search's order.
        chosen: the plan's own point; None for an empty plan.
    """

    configuration: dict[str, Treatment]
    search: str
    how: dict[str, Any]
    model: str = ""
    calibration: str = ""
    curve: list[Point] = field(default_factory=list)
    chosen: Point | None = None

    def to_json(self) -> dict[str, Any]:
        """The content of ``plan.json``."""
        return {
            "format": _FORMAT,
            "model": self.model,
            "calibration": self.calibration,
            "search": self.search,
            "how": self.how,
            "configuration": configuration_to_json(self.configuration),
            "curve": [asdict(point) for point in self.curve],
            "chosen": asdict(self.chosen) if self.chosen else None,
        }

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> "Plan":
        """The inverse of ``to_json``; InputError if it is none."""
        try:
            if not isinstance(stored, Mapping):
                raise InputError("plan: it holds no names and values")
            if stored["format"] != _FORMAT:
                raise InputError(f"plan: format {stored['format']}, this dtm_fast reads {_FORMAT}")
            for name, kind, said in (
                ("configuration", Mapping, "names and values"),
                ("how", Mapping, "names and values"),
                ("curve", list, "list"),
            ):
                if not isinstance(stored[name], kind):
                    raise InputError(f"plan: its {name} holds no {said}")
            if not all(isinstance(each, str) for each in stored["configuration"].values()):
                raise InputError("plan: a treatment of its configuration is no text")
            plan = cls(
                configuration=configuration_from_json(stored["configuration"]),
                search=stored["search"],
                how=dict(stored["how"]),
                model=stored["model"],
                calibration=stored.get("calibration", ""),
                curve=[Point.from_json(point) for point in stored["curve"]],
                chosen=Point.from_json(stored["chosen"]) if stored["chosen"] else None,
            )
        except KeyError as error:
            raise InputError(f"plan: its {error.args[0]} is missing") from error
        if not all(isinstance(each, str) for each in (plan.search, plan.model, plan.calibration)):
            raise InputError("plan: its search, model or calibration is no text")
        return plan

    @classmethod
    def read(cls, path: Path) -> "Plan":
        """The plan in a file.

        Raises:
            InputError: it cannot be read, or is no plan; the message says where.
        """
        try:
            stored = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: {error}") from error
        try:
            return cls.from_json(stored)
        except InputError as error:
            raise InputError(f"{path}: not a plan of dtm_fast: {error}") from error

    def check(self, decoder: Decoder) -> None:
        """Raises InputError unless this plan is for the decoder's model and calibration."""
        check_configuration(decoder, self.configuration)
        check_origin(decoder, self.configuration, self.model, self.calibration)


def share_of(decoder: Decoder, configuration: Configuration) -> float:
    """The share of the components' parameters that the configuration treats."""
    total = sum(component.numel for component in decoder.components.values())
    return sum(decoder.component(path).numel for path in configuration) / total
