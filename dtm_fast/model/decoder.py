"""A Hugging Face decoder as an ordered list of layers, each with its components."""

from __future__ import annotations

import difflib
import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from dtm_fast.errors import ComponentError, ModelError
from dtm_fast.model.identity import model_identity
from dtm_fast.model.input_statistics import InputStatistics
from dtm_fast.nn.linear_layer import LinearLayer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from dtm_fast.model.calibration import Calibration


@dataclass(frozen=True)
class Component:
    """One weight matrix of a decoder layer.

    Attributes:
        path: the module's path in the model, such as ``model.layers.3.self_attn.q_proj``.
        layer: index of its decoder layer, from 0.
        name: the path inside the layer, ``self_attn.q_proj``; the same in every layer.
        module: the linear module that holds the weight.
        inputs: what enters it, where the decoder has a calibration.
    """

    path: str
    layer: int
    name: str
    module: nn.Module
    inputs: InputStatistics | None = None

    @property
    def transposed(self) -> bool:
        """Whether the module stores its weight as [K, N] (GPT-2's ``Conv1D``) instead of [N, K]."""
        from transformers.pytorch_utils import Conv1D

        return isinstance(self.module, Conv1D)

    @property
    def parameter(self) -> nn.Parameter:
        """The module's weight as it stores it."""
        weight = self.module.weight
        if not isinstance(weight, nn.Parameter):
            raise ComponentError(f"{self.path}: its weight is computed from other parameters, not one itself")
        return weight

    @property
    def weight(self) -> Tensor:
        """The weight as [N, K], output channels first; a view, never a copy."""
        weight = self.parameter.detach()
        return weight.t() if self.transposed else weight

    @cached_property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        rows, columns = self.parameter.shape
        return (columns, rows) if self.transposed else (rows, columns)

    @property
    def numel(self) -> int:
        """Number of weights."""
        return self.parameter.numel()


@dataclass(frozen=True)
class Decoder:
    """The layers of a causal language model in depth order, and the components in them.

    Attributes:
        model: the Hugging Face model that was looked at.
        layers: the decoder layers, first to last.
        components: path → component, in depth order.
        calibration: identity of the calibration whose inputs the components have; empty without one.
    """

    model: PreTrainedModel
    layers: tuple[nn.Module, ...]
    components: dict[str, Component]
    calibration: str = ""

    @classmethod
    def of(cls, model: nn.Module, calibration: Calibration | None = None) -> Decoder:
        """Finds the decoder's layers and components from the modules themselves.

        The layers are the ``ModuleList`` that holds the most parameters; the components are the modules
        inside it that multiply by a two-dimensional floating-point weight.

        Args:
            model: a causal language model.
            calibration: of this very model; gives the components their ``inputs``.

        Raises:
            ModelError: if the model has no list of layers, or its layers no weight matrix, or two components the same
                one, or the calibration is of another model.
        """
        from transformers.pytorch_utils import Conv1D

        lists = [
            (path, module)
            for path, module in model.named_modules()
            if isinstance(module, nn.ModuleList) and len(module)
        ]
        if not lists:
            raise ModelError(f"{type(model).__name__} has no list of decoder layers")
        path, layers = max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))
        if calibration is not None and calibration.model != model_identity(model):
            raise ModelError("the calibration is of another model, or of this one with other weights")
        inputs = {} if calibration is None else calibration.inputs
        components = {
            (full := f"{path}.{index}.{name}"): Component(full, index, name, module, inputs.get(full))
            for index, layer in enumerate(layers)
            for name, module in layer.named_modules()
            if isinstance(module, (nn.Linear, Conv1D)) and _has_float_weight(module)
        }
        owners: dict[int, str] = {}
        weights = {full: component.module.weight for full, component in components.items()}
        for full, weight in weights.items():
            owner = owners.setdefault(id(weight), full)
            if owner != full:
                raise ModelError(
                    f"{type(model).__name__}: {owner} and {full} share one weight, so that neither can be treated alone"
                )
        # A model whose components are all accelerated, or packed, has none left, but can be measured as it is.
        if not components and not any(
            isinstance(each, (LinearLayer, nn.Linear)) for each in layers.modules()
        ):
            raise ModelError(f"the layers of {type(model).__name__} ({path}) hold no weight matrix")
        fused = [name for name, parameter in layers.named_parameters() if parameter.dim() > 2]
        if fused:
            warnings.warn(
                f"{type(model).__name__}: {len(fused)} weights of more than two dimensions (experts?) are no "
                f"components, first: {path}.{fused[0]}",
                stacklevel=3,
            )
        identity = "" if calibration is None else calibration.identity
        return cls(cast("PreTrainedModel", model), tuple(layers), components, identity)

    def component(self, path: str) -> Component:
        """The component at ``path``.

        Raises:
            ComponentError: if there is none; the message lists the nearest paths.
        """
        try:
            return self.components[path]
        except (KeyError, TypeError):
            near = difflib.get_close_matches(str(path), self.components, n=3, cutoff=0.5)
            hint = f"; nearest: {', '.join(near)}" if near else ""
            raise ComponentError(f"the model has no component {path!r}{hint}") from None


def _has_float_weight(module: nn.Module) -> bool:
    """Not where it is packed: compressed-tensors' layers have none before their first call."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, torch.Tensor) and torch.is_floating_point(weight)


def components(model: nn.Module) -> list[str]:
    """The module paths of all components of ``model``, in depth order.

    Source: Deiseroth et al. 2023 (arXiv 2311.01544): a component is one weight matrix of a decoder block.
    """
    return list(Decoder.of(model).components)
