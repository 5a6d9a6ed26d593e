"""A plan in a living model: layers on our kernels in place of its components, and out again, bit for bit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple, Protocol

import torch
from torch import nn

from dtm_fast.compression.configuration import Configuration, check_configuration, check_origin
from dtm_fast.compression.placement import Placement, treated, untreated, why_not_replaced
from dtm_fast.errors import ModelError
from dtm_fast.model import Calibration, Component, Decoder
from dtm_fast.nn.linear_layer import LinearLayer

_RECORD = "_dtm_fast_accelerated"


class HasConfiguration(Protocol):
    """Such as dtm_fast.plan.Plan; if it has a ``model``, this is the identity of the model that it is for."""

    @property
    def configuration(self) -> Configuration:
        """Component → treatment."""


class Computed(NamedTuple):
    """What computes a component.

    Attributes:
        layer: the name of its class.
        reason: one line on why it is that.
    """

    layer: str
    reason: str


@dataclass(frozen=True)
class Accelerated:
    """What computes each component now; printed, a line for each.

    Attributes:
        components: path → what computes it, in depth order.
    """

    components: dict[str, Computed]

    def __str__(self) -> str:
        """How many there are of each layer, then each component with its layer and the reason."""
        counts = Counter(each.layer for each in self.components.values())
        total = ", ".join(f"{count} {layer}" for layer, count in counts.most_common())
        lines = [f"{path}: {each.layer}, {each.reason}" for path, each in self.components.items()]
        return "\n".join([f"{len(self.components)} components: {total}", *lines])


@dataclass
class _Swap:
    """A module and the layer that took its place."""

    parent: nn.Module
    name: str
    layer: nn.Module
    original: nn.Module | None

    def is_in(self) -> bool:
        """Whether the layer still stands where it was put."""
        return getattr(self.parent, self.name, None) is self.layer


@dataclass
class _Record:
    """What ``restore`` needs to know; an attribute of the model, but no part of its tree of modules."""

    swaps: dict[str, _Swap]
    dtype: torch.dtype


def accelerate(
    model: nn.Module,
    plan: Configuration | HasConfiguration | None = None,
    *,
    trainable: bool = False,
    keep_original: bool = True,
    calibration: Calibration | None = None,
) -> Accelerated:
    """Puts layers on our kernels in place of the components of a Hugging Face model, in place.

    Each layer computes what its treatment is measured with, so that the model's FDT is the one that the evaluators give
    for the configuration, up to the order in which floats are summed:

    - ``W8A8``: ``nn.Int8Linear``, the products in int8, whose sums are exact where the evaluators' are rounded.
    - Weights with zeros, such as ``Prune`` makes: ``nn.SparseLinear`` where that is faster (``break_even.TABLE``), else
      torch's own layer with the compressed weight; if ``trainable``, pruned ones become ``nn.MaskedLinear``.
    - Treatments of the input without a kernel, ``LLMInt8``: ``TreatedInput`` around torch's own layer, not faster.
    - Any other, such as ``Int8`` or ``Int4``: the compressed weight in torch's own layer, not faster, or in an
      ``nn.MaskedLinear`` that keeps all where that is.

    Without a plan nothing is compressed: weights that hold many zeros already go to ``nn.SparseLinear`` where that is
    faster, dense ones to an ``nn.MaskedLinear`` that keeps all where that is (bfloat16, on most instruction sets), and
    the others stay. Print what is returned to see what became of each component, and why.

    Layers that are not trainable are for inference: call the model under ``torch.no_grad()``, as ``generate`` does. The
    model can be compiled, copied, cast, moved, and saved by ``state_dict``; such a state loads into a model that was
    accelerated by the same plan.

    The modules that were replaced are kept for ``restore``, outside of the tree of modules, so that ``parameters()``
    and ``state_dict()`` do not see them. This takes their memory on top of what the layers take: in int8 one byte a
    weight, sparse about five for each that is kept.

    Args:
        model: a causal language model, in float32 or bfloat16; in other dtypes nothing becomes faster.
        plan: component → treatment, or what has such a ``configuration``, as a ``Plan`` does. A plan says for which
            model it was made; for another, such as the same in another dtype, give its ``configuration``.
        trainable: whether gradients must flow. Pruned components are then trained, with weights of their own; other
            compressed weights are not, and treatments of the input are refused.
        keep_original: False lets go of the replaced modules once all layers are made; then ``restore`` refuses.
        calibration: of this model, for treatments that look at a component's inputs, such as ``GPTQ``.

    Returns:
        What computes each component now, and why.

    Raises (and then leaves the model as it was):
        ComponentError, TreatmentError: the configuration does not fit the model.
        InputError: the plan was made for another model, or with another calibration.
        ModelError: the model is accelerated already, has no components, or has one that cannot be replaced; the
            calibration is of another model.
    """
    if _RECORD in vars(model):
        raise ModelError("accelerate: the model is accelerated already: dtm_fast.restore(model) first")
    decoder = Decoder.of(model, calibration)
    users = Counter(id(each) for _, each in model.named_parameters(remove_duplicate=False))

    def why_not(component: Component) -> str | None:
        return why_not_replaced(component, users[id(component.parameter)])

    # Tensors made in inference mode could not be trained, and torch multiplies by some of them much slower.
    with torch.inference_mode(False), torch.no_grad():
        if plan is None:
            placed = {path: _as_it_is(each, trainable, why_not) for path, each in decoder.components.items()}
        else:
            placed = _planned(decoder, plan, trainable, why_not)
    swaps: dict[str, _Swap] = {}
    for path, (layer, _) in placed.items():
        if layer is not None:
            parent, _, name = path.rpartition(".")
            original = decoder.components[path].module
            swaps[path] = _Swap(model.get_submodule(parent), name, layer, original)
    _swap(swaps)
    if not keep_original:
        for swap in swaps.values():
            swap.original = None
    setattr(model, _RECORD, _Record(swaps, _dtype(model)))
    return Accelerated(
        {
            path: Computed(type(decoder.components[path].module if layer is None else layer).__name__, reason)
            for path, (layer, reason) in placed.items()
        }
    )


def is_accelerated(model: nn.Module) -> bool:
    """Whether layers on our kernels are in it, as ``accelerate`` and ``load_export`` put them there."""
    return _RECORD in vars(model) or any(isinstance(module, LinearLayer) for module in model.modules())


def restore(model: nn.Module) -> None:
    """Takes out what ``accelerate`` put in: the very same modules with the very same parameters are back.

    What was done to the whole model in the meantime is done to them: each is moved to the device where its layer is
    now, cast if the model's dtype is another now, and put in its layer's mode (train or eval). What was trained, or
    loaded into the layers, is lost with these; but where ``accelerate`` without a plan put an ``nn.MaskedLinear`` that
    keeps all, that has the component's own weight, and what was loaded into it stays. A model that is not accelerated
    stays as it is.

    Args:
        model: that ``accelerate`` was called with, or a copy of it.

    Raises:
        ModelError: the modules were not kept, or a layer is not where it was put. Nothing is changed then.
    """
    record: _Record | None = vars(model).get(_RECORD)
    if record is None:
        return
    there = set(map(id, model.modules()))
    for path, swap in record.swaps.items():
        if swap.original is None:
            raise ModelError(
                "restore: the original modules were not kept (keep_original=False): load the model anew"
            )
        if not swap.is_in() or id(swap.layer) not in there:
            raise ModelError(f"restore: at {path} is not the layer that accelerate put there")
    dtype = _dtype(model)
    for swap in record.swaps.values():
        assert swap.original is not None
        device = next(chain(swap.layer.parameters(), swap.layer.buffers())).device
        swap.original.to(device, None if dtype == record.dtype else dtype)
        swap.original.train(swap.layer.training)
    for swap in record.swaps.values():
        setattr(swap.parent, swap.name, swap.original)
    delattr(model, _RECORD)


def _planned(
    decoder: Decoder,
    plan: Configuration | HasConfiguration,
    trainable: bool,
    why_not: Callable[[Component], str | None],
) -> dict[str, Placement]:
    """A placement of every component; those that the plan does not name stay."""
    identity = getattr(plan, "model", "")
    configuration: Configuration = getattr(plan, "configuration", plan)  # type: ignore[arg-type]
    check_configuration(decoder, configuration)
    check_origin(decoder, configuration, identity, getattr(plan, "calibration", ""))
    for path in configuration:
        reason = why_not(decoder.components[path])
        if reason is not None:
            raise ModelError(f"{path} cannot be replaced: {reason}")
    return {
        path: treated(component, configuration[path], trainable)
        if path in configuration
        else Placement(None, "not in the plan")
        for path, component in decoder.components.items()
    }


def _as_it_is(component: Component, trainable: bool, why_not: Callable[[Component], str | None]) -> Placement:
    reason = why_not(component)
    return untreated(component, trainable) if reason is None else Placement(None, reason)


def _swap(swaps: dict[str, _Swap]) -> None:
    """Puts all layers in, or none."""
    try:
        for swap in swaps.values():
            setattr(swap.parent, swap.name, swap.layer)
    except BaseException:
        for swap in swaps.values():
            setattr(swap.parent, swap.name, swap.original)
        raise


def _dtype(model: nn.Module) -> torch.dtype:
    """That of the first parameter, as a rule the embedding: a cast of the model changes it."""
    return next(each.dtype for each in model.parameters() if each.is_floating_point())
