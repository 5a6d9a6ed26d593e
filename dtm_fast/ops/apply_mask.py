"""A weight with the entries that a bitmask drops set to zero."""

from typing import Any, cast

import torch

from dtm_fast.ops import backends, checks, native
from dtm_fast.ops.library import is_recorded, register
from dtm_fast.ops.mask_bits import check_packed, unpack_mask_reference


def apply_mask(weight: torch.Tensor, mask: torch.Tensor, *, backend: str | None = None) -> torch.Tensor:
    """Make a copy of a weight that is zero where a packed mask drops it.

    Equals `torch.where(unpack_mask(mask, K), weight, 0)`. All backends return the same bits; what is dropped
    becomes 0 even if it is NaN. The backward is the operation itself, applied to the gradient.

    Args:
        weight: [N, K], float32 or bfloat16.
        mask: [N, ceil(K / 8)] uint8, as pack_mask makes it.
        backend: None (the best), "cpu" or "reference".

    Returns:
        [N, K] in the dtype of weight, contiguous.

    Raises:
        TypeError: an argument is no dense tensor of such a dtype.
        ValueError: shapes or devices do not fit, mask has bits set beyond K; backend is unknown.
        RuntimeError: backend cannot run.
    """
    if backend != "reference":
        checks.no_tangent("apply_mask", weight)
    if is_recorded(weight, mask) or (backend != "reference" and checks.gradient_needed(weight)):
        return cast(torch.Tensor, OPERATOR(weight, mask, backend))
    return _run(weight, mask, backend)


def apply_mask_reference(weight: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The reference twin."""
    return torch.where(unpack_mask_reference(mask, weight.shape[1]), weight, 0)


def _apply_mask_cpu(weight: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    cpu, isa, threads = native.cpu_call()
    weight, mask = native.as_rows(weight), native.as_rows(mask)
    y = weight.new_empty(weight.shape)
    cpu.apply_mask(
        isa,
        threads,
        native.FLOAT_TYPES[weight.dtype],
        weight.data_ptr(),
        weight.stride(0),
        mask.data_ptr(),
        mask.stride(0),
        *weight.shape,
        y.data_ptr(),
    )
    return y


def _check(weight: torch.Tensor, mask: torch.Tensor) -> None:
    checks.tensor("weight", weight, (torch.float32, torch.bfloat16))
    checks.dims("weight", weight, "[N, K]", 2)
    check_packed("mask", mask, weight.shape[1])
    checks.dims("mask", mask, "[N, ceil(K / 8)]", 2)
    checks.size("mask", mask, 0, weight.shape[0], "N of weight")
    checks.same_device("weight", weight, mask=mask)


def _run(weight: torch.Tensor, mask: torch.Tensor, backend: str | None = None) -> torch.Tensor:
    _check(weight, mask)
    chosen = backends.choose("apply_mask", backend, weight.device)
    checks.contents(checks.padding_bits_zero, "mask", mask, weight.shape[1])
    run = _apply_mask_cpu if chosen == "cpu" else apply_mask_reference
    return run(weight, mask)


def _fake(weight: torch.Tensor, mask: torch.Tensor, backend: str | None = None) -> torch.Tensor:
    _check(weight, mask)
    return weight.new_empty(weight.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, mask, ctx.backend = inputs
    ctx.save_for_backward(mask)


def _backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
    (mask,) = ctx.saved_tensors
    return OPERATOR(gradient, mask, ctx.backend), None, None


OPERATOR = register(
    "apply_mask(Tensor weight, Tensor mask, str? backend=None) -> Tensor",
    _run,
    _fake,
    setup_context=_setup_context,
    backward=_backward,
)
