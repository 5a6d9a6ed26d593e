"""A plan as a Hugging Face checkpoint that transformers, vLLM and this package load."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from dtm_fast.compression import Change
from dtm_fast.compression.accelerated import is_accelerated
from dtm_fast.compression.checkpoints import write_folder
from dtm_fast.errors import InputError, ModelError, RunError, TreatmentError
from dtm_fast.export.checkpoint_files import write_index
from dtm_fast.export.forms import PACK_QUANTIZED, form_of, prunes, quantization_config, store
from dtm_fast.export.masks import write_masks
from dtm_fast.export.resolution import torn_layer
from dtm_fast.export.served_layers import served_layers
from dtm_fast.export.skeleton import linear_shapes
from dtm_fast.export.validation import validate
from dtm_fast.model import Calibration, Component, Decoder
from dtm_fast.model.soundness import check_storable, check_vocabulary, first_line
from dtm_fast.plan import Plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PLAN = "dtm_plan.json"


def export_checkpoint(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    plan: Plan,
    folder: str | Path,
    *,
    calibration: Calibration | None = None,
    for_vllm: bool = False,
) -> list[str]:
    """Writes the model as the plan makes it, with its tokenizer and the plan: a folder that loads anywhere.

    Components under ``W8A8`` are int-quantized and those under ``Int8`` pack-quantized, as compressed-tensors calls the
    forms; all others are dense, in the model's dtype. Pruned ones are dense with zeros, and their masks lie beside them
    in ``masks.safetensors``: ``PATH.mask``, uint8 [N, ceil(K / 8)], little bit first. The plan is ``dtm_plan.json``.

    What others compute from it. vLLM: what the plan measured, up to the rounding of its kernels, and of the scales of
    pack-quantized weights to its dtype. transformers: products of floats, by the weights that were measured where the
    model is float32 (in bfloat16 it rounds all scales first); but it quantizes the inputs of int-quantized ones to
    steps of absmax / 127.5 from -128 to 127, where the plan, this package and vLLM take absmax / 127 and ±127, so that
    its FDT under ``W8A8`` is another one. ``load_export`` brings the folder back onto this package's kernels.

    Args:
        model: that the plan was made for; it is not changed.
        tokenizer: the model's.
        plan: the plan.
        folder: where to; it must not be there yet, or be empty. Appears with all in it or not at all.
        calibration: that the plan was measured with, if a treatment needs one.
        for_vllm: refuse what vLLM would not load as the plan means it.

    Returns:
        A line for each thing that another reader would not do as the plan means it, with the reader in front:
        ``vLLM: `` and what ``validate`` says of the folder, or ``transformers: ``.

    Raises:
        InputError: the plan is for another model or another calibration.
        ModelError: the model is quantized or accelerated already, or its generation config cannot be saved; the
            tokenizer is of another vocabulary.
        TreatmentError: no form says what a treatment does (``LLMInt8``; int8 where there is no ``torch.nn.Linear``), or
            ``for_vllm`` and the plan does not treat alike what vLLM multiplies by as one matrix.
        RunError: the folder holds something, or cannot be written.
    """
    from transformers import PreTrainedTokenizerBase

    folder = Path(folder).resolve()
    if not isinstance(plan, Plan):
        raise InputError(
            f"plan: expected a Plan, got {type(plan).__name__}; Plan(configuration, 'by hand', {{}}) makes one"
        )
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise InputError(f"tokenizer: expected the model's, got {type(tokenizer).__name__}")
    decoder = Decoder.of(model, calibration)
    plan.check(decoder)
    _check_base(model)
    check_storable(model)
    check_vocabulary(model, tokenizer)
    forms = _forms(decoder, plan)
    if for_vllm:
        _check_alike(model, forms)
    check_free(folder)

    def write(unfinished: Path) -> None:
        _write_model(unfinished, decoder, plan, forms)
        tokenizer.save_pretrained(unfinished)
        (unfinished / PLAN).write_text(json.dumps(plan.to_json(), indent=2) + "\n")
        found = validate(unfinished)
        if for_vllm and found:
            raise TreatmentError(f"vLLM would not load this: {found[0]}{_more(found)}")
        problems.extend(f"vLLM: {line}" for line in found)
        problems.extend(f"transformers: {line}" for line in _not_for_transformers(decoder, forms))

    problems: list[str] = []
    write_folder(folder, write)
    return problems


def _forms(decoder: Decoder, plan: Plan) -> dict[str, str]:
    """Component → its form, in depth order; without the dense ones."""
    forms = {}
    for path, component in decoder.components.items():
        treatment = plan.configuration.get(path)
        if treatment is None:
            continue
        form = form_of(treatment)
        if form is None and treatment.treats_input:
            raise TreatmentError(f"{path}: no form of a checkpoint says what {treatment.key} does to inputs")
        if form is not None and not isinstance(component.module, nn.Linear):
            raise TreatmentError(
                f"{path}: {treatment.key} cannot be exported: compressed-tensors holds torch.nn.Linear quantized, "
                f"and this is {type(component.module).__name__}"
            )
        if form is not None:
            forms[path] = form
    return forms


def _not_for_transformers(decoder: Decoder, forms: Mapping[str, str]) -> list[str]:
    """Why plain transformers (5.23) does not load the folder, a line each; ``load_export`` does."""
    experts = [
        name
        for name, parameter in decoder.model.named_parameters()
        if parameter.dim() > 2 and "experts" in name
    ]
    if forms and experts:
        return [f"does not load a model with experts ({experts[0]}) of which anything is quantized"]
    packed = (decoder.component(path) for path, form in forms.items() if form == PACK_QUANTIZED)
    return [
        f"does not load a {type(component.module).__name__} packed: {component.path}"
        for component in packed
        if type(component.module) is not nn.Linear
    ]


def _check_base(model: PreTrainedModel) -> None:
    """The model has the weights that the plan was made for, not what became of them."""
    if getattr(model.config, "quantization_config", None) is not None:
        raise ModelError(
            f"{type(model).__name__}: the model is quantized already; a plan is exported from its base"
        )
    if is_accelerated(model):
        raise ModelError(
            f"{type(model).__name__}: the model is accelerated: dtm_fast.restore(model) first, or load it anew"
        )


def _check_alike(model: PreTrainedModel, forms: Mapping[str, str]) -> None:
    torn = [
        torn_layer(layer, {shard: forms.get(shard, "dense") for shard in layer.shards})
        for layer in served_layers(linear_shapes(model))
        if len({forms.get(shard) for shard in layer.shards}) > 1
    ]
    if torn:
        raise TreatmentError(
            f"{torn[0]}{_more(torn)}; searches take fused=True, to treat them alike, and export without for_vllm "
            "writes them as they are"
        )


def _more(lines: list[str]) -> str:
    return f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""


def check_free(folder: Path) -> None:
    """Raises RunError unless ``folder`` is not there or empty, and can be made."""
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise RunError(f"{folder}: there is something already; choose another folder")
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{folder}: cannot be written: {first_line(error)}") from error


def _stored(form: str, component: Component) -> dict[str, Tensor]:
    try:
        return store(form, component.weight)
    except ValueError as error:
        raise TreatmentError(f"{component.path}: {error}") from error


def _write_model(folder: Path, decoder: Decoder, plan: Plan, forms: Mapping[str, str]) -> None:
    """Configuration, weights and masks."""
    model = decoder.model
    # What is stored in a form is quantized from the base's own weight, so that no number is rounded twice.
    stored = {path: _stored(form, decoder.component(path)) for path, form in forms.items()}
    dense = {path: treatment for path, treatment in plan.configuration.items() if path not in forms}
    with Change(decoder, dense):
        state: dict[str, Tensor] = dict(model.state_dict())
        for path, tensors in stored.items():
            del state[f"{path}.weight"]
            state |= {f"{path}.{name}": tensor for name, tensor in tensors.items()}
        model.save_pretrained(folder, state_dict=state)
        masks = {
            path: decoder.component(path).weight != 0
            for path, treatment in dense.items()
            if prunes(treatment)
        }
    if masks:
        write_masks(folder, masks)
        # vLLM takes every safetensors file of a folder without an index for weights.
        write_index(folder)
    if forms:
        file = folder / "config.json"
        config = json.loads(file.read_text())
        config["quantization_config"] = quantization_config(forms, linear_shapes(model))
        file.write_text(json.dumps(config, indent=2) + "\n")
