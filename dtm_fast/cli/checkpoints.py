"""The commands about checkpoints: two of them compared, a plan written as one, one brought back."""

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from dtm_fast import console
from dtm_fast.cli.options import (
    MODEL_HELP,
    AsJson,
    BatchSize,
    CalibrationText,
    Completion,
    Count,
    DType,
    Model,
    Prefix,
    Text,
    dtype_of,
)
from dtm_fast.cli.setting import check_probes, print_json, summaries
from dtm_fast.errors import ModelError
from dtm_fast.export import export_checkpoint, export_llama_quantize, load_export, validate
from dtm_fast.export.checkpoint import check_free
from dtm_fast.export.llama_quantize import check_writable, tensor_types
from dtm_fast.measure import DEFAULT_SOURCE, EXTRA_METRICS, Probes, ReferenceEvaluator, read_documents
from dtm_fast.model import Calibration, Decoder, load_model
from dtm_fast.plan import Plan, Stop


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
    check_probes(prefix, completion, probes, batch_size)
    Stop(min_fdt=min_fdt).check(completion)
    documents = read_documents(text)
    base_model, tokenizer = load_model(base, dtype_of(dtype))
    other_model, other_tokenizer = load_model(other, dtype_of(dtype))
    vocabulary = (tokenizer.get_vocab(), base_model.get_output_embeddings().weight.shape[0])
    if vocabulary != (other_tokenizer.get_vocab(), other_model.get_output_embeddings().weight.shape[0]):
        raise ModelError(f"{other}: its tokenizer is of another vocabulary than that of {base}")
    made = Probes.from_text(
        base_model, tokenizer, documents, prefix, completion, probes, batch_size=batch_size
    )
    evaluator = ReferenceEvaluator(other_model, made, base=base_model)
    metrics = [m for m in EXTRA_METRICS if prefix > 1 or m not in ("perplexity", "agreement")]
    (measurement,) = evaluator.measure([{}], metrics)
    if as_json:
        print_json(
            {
                "base": base,
                "other": other,
                "floor": asdict(evaluator.floor),
                "summary": summaries(measurement),
                "probes": measurement.to_json(),
            }
        )
    else:
        console.out.print(console.measurement_table(f"{other} against {base}", measurement, evaluator.floor))
        console.show_floor(evaluator.floor)
    if min_fdt is not None and measurement.summary("fdt").p75 < min_fdt:
        console.show_error(f"FDT_75 is {measurement.summary('fdt').p75:g}, lower than {min_fdt:g}")
        raise typer.Exit(1)


def export(
    model: Model,
    plan: Annotated[Path, typer.Argument(help="plan.json of a run of this model.")],
    folder: Annotated[Path, typer.Argument(help="The folder to write; it must not be there yet.")],
    for_vllm: Annotated[
        bool, typer.Option(help="Refuse what vLLM would load otherwise than planned.")
    ] = False,
    llama_quantize: Annotated[
        Path | None, typer.Option(help="Write a --tensor-type-file for llama-quantize, too.")
    ] = None,
    calibration: CalibrationText = DEFAULT_SOURCE,
    dtype: DType = "auto",
    as_json: AsJson = False,
) -> None:
    """Writes a plan as a Hugging Face folder that transformers, vLLM and this package load."""
    made = Plan.read(plan)
    check_free(folder)
    loaded, tokenizer = load_model(model, dtype_of(dtype))
    calibrated = None
    if any(treatment.needs_inputs for treatment in made.configuration.values()):
        calibrated = Calibration.from_text(loaded, tokenizer, read_documents(calibration))
    decoder = Decoder.of(loaded, calibrated)
    if llama_quantize is not None:
        tensor_types(made, decoder)  # raises before anything is written
        check_writable(llama_quantize)
    said = export_checkpoint(loaded, tokenizer, made, folder, calibration=calibrated, for_vllm=for_vllm)
    written = [folder]
    if llama_quantize is not None:
        export_llama_quantize(made, decoder, llama_quantize)
        written.append(llama_quantize)
    if as_json:
        print_json({"written": [str(path) for path in written], "problems": said})
        return
    for path in written:
        console.show_written(path)
    for line in said:
        console.show_note(line)


def load(
    folder: Annotated[
        str, typer.Argument(help="A folder that export wrote, or another's int-quantized one.")
    ],
    dtype: DType = "auto",
    as_json: AsJson = False,
) -> None:
    """Brings an exported folder back onto this package's kernels, and says what runs on which."""
    said = validate(folder)
    loaded, _ = load_export(folder, dtype_of(dtype))
    kinds = Counter(
        type(module).__name__ for module in loaded.modules() if type(module).__name__.endswith("Linear")
    )
    if as_json:
        print_json({"folder": folder, "layers": dict(kinds), "vllm": said})
        return
    console.show_note(f"{folder}: " + ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())))
    for line in said:
        console.show_note(f"vLLM: {line}")


def add_to(app: typer.Typer) -> None:
    """Makes them commands of ``app``."""
    for command in (evaluate, export, load):
        app.command()(command)
