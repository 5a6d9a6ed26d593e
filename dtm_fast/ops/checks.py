"""Checks of arguments, before native code sees them: name the argument, what it is and what was expected."""

import math
from collections.abc import Collection

import torch


def tensor(name: str, value: object, dtypes: Collection[torch.dtype]) -> None:
    """Raise TypeError unless `value` is a dense tensor of one of `dtypes`."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if value.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense (strided) tensor, got layout {value.layout}")
    if value.dtype not in dtypes:
        expected = " or ".join(str(dtype) for dtype in dtypes)
        raise TypeError(f"{name}: expected dtype {expected}, got {value.dtype}")


def dims(name: str, value: torch.Tensor, shape: str, *allowed: int) -> None:
    """Raise ValueError unless `value` has an allowed number of dimensions; `shape` is for the message."""
    if value.dim() not in allowed:
        raise ValueError(f"{name}: expected shape {shape}, got {list(value.shape)}")


def at_least_one_dim(name: str, value: torch.Tensor) -> None:
    """Raise ValueError if `value` is a scalar where rows [..., K] are expected."""
    if value.dim() == 0:
        raise ValueError(f"{name}: expected shape [..., K], got a tensor without dimensions")


def size(name: str, value: torch.Tensor, dim: int, expected: int, source: str) -> None:
    """Raise ValueError unless dimension `dim` of `value` is `expected`, which comes from `source`."""
    if value.shape[dim] != expected:
        raise ValueError(
            f"{name}: expected size {expected} in dimension {dim} ({source}), got shape {list(value.shape)}"
        )


def same_device(first_name: str, first: torch.Tensor, /, **others: torch.Tensor | None) -> None:
    """Raise ValueError unless all tensors are on the device of the first."""
    for name, other in others.items():
        if other is not None and other.device != first.device:
            raise ValueError(
                f"{name}: expected device {first.device}, that of {first_name}, got {other.device}"
            )


def finite(name: str, value: torch.Tensor) -> None:
    """Raise ValueError if `value` holds a NaN or an infinity, and say how many."""
    # The sum is much cheaper, and not finite if a term is not; finite terms can overflow, though.
    if not math.isfinite(value.sum().item()) and not bool(value.isfinite().all()):
        count = int(value.numel() - value.isfinite().sum())
        raise ValueError(f"{name}: expected finite values, got {count} NaN or infinite of {value.numel()}")


def padding_bits_zero(name: str, packed: torch.Tensor, columns: int) -> None:
    """Raise ValueError if a packed mask [..., ceil(columns / 8)] has a bit set beyond `columns`."""
    used = columns % 8
    if used and packed.numel() and bool((packed[..., -1] >> used).any()):
        raise ValueError(
            f"{name}: mask bits out of range: expected zeros in bits {used} to 7 of the last byte of a row "
            f"(K = {columns}), got a 1"
        )


def gradient_needed(*tensors: object) -> bool:
    """Whether autograd will need a backward of an operation on these arguments, checked or not."""
    return torch.is_grad_enabled() and any(
        isinstance(each, torch.Tensor) and each.requires_grad for each in tensors
    )


def no_gradient_needed(operation: str, *tensors: torch.Tensor | None) -> None:
    """Raise RuntimeError if autograd would need a backward of this operation."""
    if gradient_needed(*tensors):
        raise RuntimeError(f"{operation} has no backward yet; call it under torch.no_grad()")
