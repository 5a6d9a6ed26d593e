"""Which layer computes a component on our kernels, and why."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from dtm_fast.compression.break_even import density_of, faster_layer
from dtm_fast.compression.int8 import W8A8
from dtm_fast.compression.kept_weights import compressed_weight
from dtm_fast.compression.pruning import Drop, Prune
from dtm_fast.compression.sparsegpt import SparseGPT
from dtm_fast.compression.treated_input import TreatedInput
from dtm_fast.compression.treatment import Treatment
from dtm_fast.errors import TreatmentError
from dtm_fast.model import Component
from dtm_fast.nn import Int8Linear, MaskedLinear, SparseLinear
from dtm_fast.ops import backends

_PRUNING = (Prune, SparseGPT, Drop)
_PRUNED_DENSITY = 0.9  # a checkpoint that nobody pruned has hardly a zero
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Placement(NamedTuple):
    """The layer that takes a component's place, None where the module stays, and one line on why."""

    layer: nn.Module | None
    reason: str


def why_not_replaced(component: Component, users: int) -> str | None:
    """Why no layer can take the module's place; None if one can.

    Args:
        component: of a model.
        users: how many modules of the model have its weight.
    """
    from transformers.pytorch_utils import Conv1D

    module = component.module
    if type(module) not in (nn.Linear, Conv1D):
        return f"its {type(module).__name__} may do more than multiply"
    if any(vars(module)[name] for name in _HOOKS) or "forward" in vars(module):
        return "it has hooks, which a layer in its place would not have"
    if users > 1:
        return "its weight is another module's, too"
    return None


def treated(component: Component, treatment: Treatment, trainable: bool) -> Placement:
    """The layer that computes what the treatment of the component is measured with; called without autograd.

    Args:
        component: of a decoder with a calibration where the treatment needs one.
        treatment: fits it.
        trainable: whether gradients must flow.

    Raises:
        TreatmentError: it cannot be treated after all, or not trained.
    """
    key = treatment.key
    if treatment.treats_input and trainable:
        raise TreatmentError(f"{component.path}: {key} rounds its input, which no gradient passes")
    original = component.parameter
    if isinstance(treatment, W8A8) and original.dtype in (torch.float32, torch.bfloat16):
        backend, why = backends.default("int8_linear", original.device.type)
        speed = "int8 products" if backend != "reference" else f"int8 products, not faster: {why}"
        try:
            return Placement(Int8Linear.from_linear(_linear(component, component.weight)), f"{key}: {speed}")
        except ValueError as error:
            raise TreatmentError(f"{component.path}: {error}") from error
    weight = compressed_weight(component, treatment)
    if treatment.treats_input:
        layer = TreatedInput(_dense(component, weight), treatment).train(component.module.training)
        return Placement(layer, f"{key}: as measured, not faster: no kernel treats this input")
    if trainable:
        if isinstance(treatment, _PRUNING):
            return Placement(_masked(component, weight), f"{key}: what is pruned stays 0 while it is trained")
        return Placement(_dense(component, weight), f"{key}: as measured; its weight is not trained")
    kind, why = faster_layer(weight)
    if kind is SparseLinear:
        return Placement(SparseLinear.from_linear(_linear(component, weight)), f"{key}: {why}")
    if kind is MaskedLinear:
        return Placement(MaskedLinear.from_linear(_linear(component, weight)), f"{key}: {why}")
    return Placement(_dense(component, weight), f"{key}: as measured, not faster: {why}")


def untreated(component: Component, trainable: bool) -> Placement:
    """The layer that multiplies faster by the component's weight as it is, if there is one; called without autograd."""
    weight = component.weight
    if trainable:
        density = density_of(weight)
        if density >= _PRUNED_DENSITY:
            return Placement(None, f"density {density:.2f}; not pruned")
        layer = _masked(component, weight.clone(memory_format=torch.contiguous_format))
        return Placement(layer, f"density {density:.2f}; what is 0 stays 0 while it is trained")
    kind, why = faster_layer(weight)
    if kind is SparseLinear:
        return Placement(SparseLinear.from_linear(_linear(component, weight)), why)
    if kind is MaskedLinear:
        return Placement(_whole(component), why)
    return Placement(None, why)


def _linear(component: Component, weight: Tensor) -> nn.Linear:
    """A torch.nn.Linear of this weight [N, K], with a bias of its own, in the mode of the component's module."""
    n, k = weight.shape
    module = component.module
    linear = nn.Linear(k, n, module.bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    linear.register_parameter("bias", _own_bias(module))
    return linear.train(module.training)


def _dense(component: Component, weight: Tensor) -> nn.Module:
    """A module as the component's own, of this weight [N, K] and a bias of its own."""
    if not component.transposed:
        return _linear(component, weight)
    from transformers.pytorch_utils import Conv1D

    with torch.device("meta"):
        conv = Conv1D(*weight.shape)
    conv.weight = nn.Parameter(weight.t().contiguous(), requires_grad=False)
    conv.register_parameter("bias", _own_bias(component.module))
    module: nn.Module = conv.train(component.module.training)
    return module


def _masked(component: Component, weight: Tensor) -> MaskedLinear:
    """A layer that trains what is not 0 of this weight [N, K], which becomes its own."""
    if weight.dtype not in (torch.float32, torch.bfloat16):
        raise TreatmentError(
            f"{component.path}: a masked layer trains float32 or bfloat16, not {weight.dtype}"
        )
    layer = MaskedLinear.from_linear(_linear(component, weight), weight != 0)
    layer.weight.requires_grad_(component.parameter.requires_grad)
    return layer


def _whole(component: Component) -> MaskedLinear:
    """A layer with the component's own weight, none of it masked out; a transposed one is copied."""
    linear = _linear(component, component.weight)
    if not component.transposed:
        linear.weight = component.parameter
    return MaskedLinear.from_linear(linear)


def _own_bias(module: nn.Module) -> nn.Parameter | None:
    """A copy: what casts a model changes its parameters in place."""
    bias: nn.Parameter | None = getattr(module, "bias")  # noqa: B009 - a Parameter, which mypy cannot know
    if bias is None:
        return None
    return nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
