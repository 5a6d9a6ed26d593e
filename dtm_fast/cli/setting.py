"""What every search is run on: a model, probes, an evaluator and a run directory, from the same options."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import MISSING, asdict, dataclass, fields
from datetime import datetime, timezone
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_type_hints

import torch
import typer

from dtm_fast import console
from dtm_fast.cli.options import (
    BatchSize,
    CalibrationText,
    Completion,
    Count,
    DType,
    Layers,
    Memory,
    Model,
    Prefix,
    Run,
    Text,
    dtype_of,
)
from dtm_fast.compression import Treatment
from dtm_fast.errors import InputError, ProbeError
from dtm_fast.measure import (
    DEFAULT_SOURCE,
    EXTRA_METRICS,
    Evaluator,
    Floor,
    Measurement,
    Probes,
    ReferenceEvaluator,
    read_documents,
)
from dtm_fast.measure.reference import describe
from dtm_fast.model import Calibration, Decoder, load_model, model_identity
from dtm_fast.ops import backend_info
from dtm_fast.plan import RecordedEvaluator, check_shapes
from dtm_fast.runs import RunDirectory
from dtm_fast.version import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MOST = 2**31 - 1  # of tokens or probes: no machine has room for so many
_MOST_GIB = 2**20  # more than any machine has, so that no bound is infinite
_LAYERS: tuple[Literal["auto", "fused", "transformers"], ...] = ("auto", "fused", "transformers")


@dataclass(frozen=True)
class Setting:
    """The options of every command that measures into a run directory."""

    model: Model
    run: Run
    text: Text = DEFAULT_SOURCE
    prefix: Prefix = 100
    completion: Completion = 100
    probes: Count = 64
    batch_size: BatchSize = 8
    dtype: DType = "auto"
    evaluator: Layers = "auto"
    memory: Memory = None
    calibration: CalibrationText = DEFAULT_SOURCE


@dataclass(frozen=True)
class Session:
    """A search under way.

    Attributes:
        evaluator: measures.
        directory: the run directory.
        recorded: measures into its journal, and shows progress.
        tokenizer: the model's.
        confirming: measures on other probes, into the journal of ``confirming`` in the run directory; None where none
            are wanted or the text has none.
    """

    evaluator: Evaluator | ReferenceEvaluator
    directory: RunDirectory
    recorded: RecordedEvaluator
    tokenizer: PreTrainedTokenizerBase
    confirming: RecordedEvaluator | None

    @property
    def floor(self) -> Floor:
        """The base against itself."""
        return self.evaluator.floor


def measuring(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command whose first parameter is a ``Setting`` an option for each of that one's fields."""
    own = list(inspect.signature(command).parameters.values())[1:]
    hints = get_type_hints(Setting, include_extras=True)
    shared = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.default is MISSING else field.default,
            annotation=hints[field.name],
        )
        for field in fields(Setting)
    ]

    @wraps(command)
    def with_setting(**given: Any) -> None:
        setting = Setting(**{field.name: given.pop(field.name) for field in fields(Setting)})
        command(setting, **given)

    parameters = [*shared, *(each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in own)]
    with_setting.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    with_setting.__annotations__ = {each.name: each.annotation for each in parameters}
    return with_setting


def check_probes(prefix: int, completion: int, probes: int, batch_size: int) -> None:
    """Raises InputError unless probes can be made of so many; whether the model's context has room is seen later."""
    numbers = {"prefix": prefix, "completion": completion, "probes": probes, "batch_size": batch_size}
    for name, value in numbers.items():
        if value < 1:
            raise InputError(f"{name} must be a whole number of at least 1, not {value}")
        if value > _MOST:
            raise InputError(f"{name} must be at most {_MOST}, not {value}")


def check_evaluator(name: str, memory: float | None) -> None:
    """Raises InputError unless there is such an evaluator, and so much memory can be meant."""
    known = (*_LAYERS, "reference")
    if name not in known:
        raise InputError(f"no evaluator {name!r}; known: {', '.join(known)}")
    if memory is not None and not 0 <= memory <= _MOST_GIB:
        raise InputError(f"memory: 0 to {_MOST_GIB} GiB, not {memory:g}")
    if memory is not None and name == "reference":
        raise InputError("memory: the reference keeps no states that it could bound")


@contextmanager
def session(
    setting: Setting,
    treatments: Sequence[Treatment],
    title: str,
    expected: Callable[[Decoder], int | None],
    *,
    fits: Callable[[Decoder], object] = lambda decoder: None,
    calibrated: bool = False,
    confirm: int = 0,
    quiet: bool = False,
) -> Iterator[Session]:
    """A search's session, with run.json saying how it is run; Ctrl-C ends with how to go on.

    What cannot be used is refused as soon as it can be known: before the model is loaded, or before it writes the
    completions.

    Args:
        setting: the options.
        treatments: what will be measured.
        title: beside the progress bar.
        expected: about how many measurements there will be of this model; None where nobody can know.
        fits: raises InputError where the search cannot be made of this model, which is not calibrated yet.
        calibrated: whether a calibration is needed even where no treatment needs one.
        confirm: other probes to confirm on.
        quiet: no progress.
    """
    check_evaluator(setting.evaluator, setting.memory)
    check_probes(setting.prefix, setting.completion, setting.probes, setting.batch_size)
    dtype = dtype_of(setting.dtype)
    documents, calibration_documents = read_documents(setting.text), read_documents(setting.calibration)
    RunDirectory.check(setting.run)
    model, tokenizer = load_model(setting.model, dtype)
    decoder = Decoder.of(model)
    check_shapes(decoder, treatments, decoder.components)
    fits(decoder)
    identity = {
        "model": model_identity(model),
        # Of the text alone, so that a run may begin with treatments that need none of it.
        "calibration": hashlib.sha256(json.dumps(calibration_documents).encode()).hexdigest(),
    }
    RunDirectory.check(setting.run, identity)
    console.show_note(
        f"{setting.probes} probes of {setting.prefix} + {setting.completion} tokens: the base writes its completions …"
    )

    def probes_of(count: int, other_than: Probes | None = None) -> Probes:
        return Probes.from_text(
            model,
            tokenizer,
            documents,
            setting.prefix,
            setting.completion,
            count,
            batch_size=setting.batch_size,
            other_than=other_than,
        )

    probes = probes_of(setting.probes)
    of_probes = identity | {"probes": probes.identity}
    RunDirectory.check(setting.run, of_probes)
    confirming_probes = None
    if confirm:
        console.show_note(f"{confirm} other probes, to confirm on …")
        try:
            confirming_probes = probes_of(confirm, probes)
        except ProbeError as error:
            console.show_note(f"not confirmed: {error}")
    calibration = None
    if calibrated or any(treatment.needs_inputs for treatment in treatments):
        console.show_note("calibrating: the base's activations …")
        calibration = Calibration.from_text(model, tokenizer, calibration_documents)

    def evaluator_of(probes: Probes, bound: int | None) -> Evaluator | ReferenceEvaluator:
        if setting.evaluator == "reference":
            return ReferenceEvaluator(model, probes, calibration=calibration)
        layers = _LAYERS[_LAYERS.index(setting.evaluator)]
        return Evaluator(model, probes, memory=bound, layers=layers, calibration=calibration)

    evaluator = evaluator_of(probes, None if setting.memory is None else int(setting.memory * 2**30))
    if isinstance(evaluator, Evaluator):
        console.show_note(f"measuring with {evaluator.engine}")
    identity |= _rounding(evaluator)
    of_probes |= identity
    with ExitStack() as held:
        directory = held.enter_context(RunDirectory.resume(setting.run, of_probes))
        if len(directory.journal):
            console.show_note(f"{setting.run}: resuming, {len(directory.journal)} measurements are known")
        try:
            directory.write_json("run.json", _described(evaluator, setting))
            with console.progress(title, expected(decoder), quiet=quiet) as on_finished:
                lost: dict[str, None] = {}

                def on_each(measurement: Measurement, known: bool) -> None:
                    if not measurement.finite:
                        lost[describe(measurement.configuration)] = None
                    on_finished(measurement, known)

                recorded = RecordedEvaluator(evaluator, directory.journal, on_each)
                confirming = None
                if confirming_probes is not None:
                    of_others = identity | {"probes": confirming_probes.identity}
                    other = held.enter_context(RunDirectory.resume(setting.run / "confirming", of_others))
                    # What is confirmed treats nearly all layers: states kept within them would be of no use.
                    confirming = recorded.with_evaluator(evaluator_of(confirming_probes, 0), other.journal)
                yield Session(evaluator, directory, recorded, tokenizer, confirming)
            if lost:
                console.show_note(
                    f"logits that are not finite: {next(iter(lost))}"
                    + (f" (and {len(lost) - 1} more)" if len(lost) > 1 else "")
                    + "; counted as diverging at every token"
                )
        except KeyboardInterrupt:
            console.show_note(
                f"interrupted: {len(directory.journal)} measurements are kept in {setting.run}; "
                "the same command resumes"
            )
            raise typer.Exit(130) from None


def _rounding(evaluator: Evaluator | ReferenceEvaluator) -> dict[str, str]:
    """Of a run's identity, what its figures may depend on by rounding: nothing in float32, where all decide alike."""
    if evaluator.model.dtype == torch.float32:
        return {}
    own = isinstance(evaluator, Evaluator) and not evaluator.computes_as_the_model
    return {"layers": "fused" if own else "transformers"}


def _described(evaluator: Evaluator | ReferenceEvaluator, setting: Setting) -> dict[str, Any]:
    """How a run is run, and what a report needs to know of the model."""
    import transformers

    probes = evaluator.probes
    return {
        "command": ["dtm-fast", *sys.argv[1:]],
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "model": {
            "name": setting.model,
            "type": type(evaluator.model).__name__,
            "dtype": str(evaluator.model.dtype).removeprefix("torch."),
            "parameters": sum(p.numel() for p in evaluator.model.parameters()),
        },
        "probes": {
            "text": setting.text,
            "count": len(probes),
            "prefix": probes.prefix,
            "completion": probes.completion,
        },
        "floor": asdict(evaluator.floor),
        "evaluator": evaluator.engine if isinstance(evaluator, Evaluator) else "reference",
        "components": [
            {"path": c.path, "layer": c.layer, "name": c.name, "shape": c.shape}
            for c in evaluator.decoder.components.values()
        ],
        "machine": backend_info()["cpu"],
        "versions": {
            "dtm_fast": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def write_report_of(directory: RunDirectory) -> list[Path]:
    """The report of a run; InputError where what it needs is not installed."""
    try:
        from dtm_fast.report import write_report
    except ImportError as error:
        raise InputError(f"a report needs: pip install 'dtm-fast[report]' ({error})") from error
    return write_report(directory)


def summaries(measurement: Measurement) -> dict[str, Any]:
    """The summary of every metric that was measured, as JSON values."""
    names = ("fdt", "sdt", *EXTRA_METRICS)
    return {n: asdict(measurement.summary(n)) for n in names if getattr(measurement, n) is not None}


def print_json(content: dict[str, Any]) -> None:
    """On standard output, for machines; null for numbers that are not finite, which JSON does not have."""
    print(json.dumps(_with_nulls(content), indent=2))


def _with_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _with_nulls(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_with_nulls(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
