"""Predicted harm of each component: what one forms without measuring any configuration, to compare with measuring."""

from collections.abc import Iterable

import torch
from torch import Tensor

from dtm_fast.compression import Treatment, check_configuration, compressed_weight
from dtm_fast.errors import TreatmentError
from dtm_fast.measure.probes import Probes
from dtm_fast.model import Component, Decoder


@torch.no_grad()
def layer_error(decoder: Decoder, treatment: Treatment, paths: Iterable[str]) -> dict[str, float]:
    """``(X @ (compressed - weight).T).square().sum()`` of each component, X being its inputs while calibrating.

    What layer-wise methods minimize (GPTQ, SparseGPT), as a ranking. What a treatment does to the input itself is not
    in it.

    Args:
        decoder: with a calibration.
        treatment: of each component.
        paths: of the components.

    Raises:
        TreatmentError: the decoder has no calibration, or the treatment does not fit a component.
    """
    found = {}
    for path, component in _components(decoder, treatment, paths).items():
        if component.inputs is None:
            raise TreatmentError(f"{path}: the error of a layer's output needs a calibration")
        change = _change(component, treatment)
        found[path] = float(
            ((change @ component.inputs.gram.to(change.device)) * change).sum(dtype=torch.float64)
        )
    return found


def gradient_sensitivity(
    decoder: Decoder, probes: Probes, treatment: Treatment, paths: Iterable[str]
) -> dict[str, float]:
    """Sum over probes and weights of ``(gradient * (compressed - weight))²``, for each component.

    The gradient is that of the likelihood of the base's own completions: the diagonal of the empirical Fisher matrix,
    as in ModelOpt's gradient scores and SqueezeLLM. One pass forward and back for each probe, whatever the number of
    components.

    Args:
        decoder: of the model that made the probes.
        probes: read.
        treatment: of each component.
        paths: of the components.

    Raises:
        TreatmentError: the treatment does not fit a component.
    """
    model, n = decoder.model, probes.prefix
    components = _components(decoder, treatment, paths)
    with torch.no_grad():
        changes = {path: _change(component, treatment) for path, component in components.items()}
    harm = dict.fromkeys(components, 0.0)
    weights = [component.parameter for component in components.values()]
    trained = [weight.requires_grad for weight in weights]
    try:
        for weight in weights:
            weight.requires_grad_(True)
        with torch.enable_grad():  # whatever the caller has switched off
            for row in probes.tokens.to(model.device):
                kept = len(row) - n + 1
                logits = model(row[None], use_cache=False, logits_to_keep=kept).logits[0, -kept:-1]
                loss = torch.nn.functional.cross_entropy(logits.float(), row[n:], reduction="sum")
                gradients = torch.autograd.grad(loss, weights)
                for (path, component), gradient in zip(components.items(), gradients, strict=True):
                    own = gradient.t() if component.transposed else gradient
                    harm[path] += float((own.float() * changes[path]).square().sum())
    finally:
        for weight, was in zip(weights, trained, strict=True):
            weight.requires_grad_(was)
    return harm


def _components(decoder: Decoder, treatment: Treatment, paths: Iterable[str]) -> dict[str, Component]:
    """The components at ``paths``, after looking whether the treatment fits them."""
    components = {path: decoder.component(path) for path in paths}
    check_configuration(decoder, dict.fromkeys(components, treatment))
    return components


def _change(component: Component, treatment: Treatment) -> Tensor:
    """What the treatment adds to a component's weight, float32 [N, K]."""
    return compressed_weight(component, treatment).float() - component.weight.float()
