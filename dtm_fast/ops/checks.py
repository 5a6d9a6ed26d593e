"""Checks of arguments, before native code sees them: name the argument, what it is and what was expected."""

import math
from collections.abc import Callable, Collection
from typing import TypeGuard

import torch
from torch.autograd import forward_ad
from torch.utils.weak import WeakIdKeyDictionary

# By tensor, the states in which it was read and found good: a set of tuples.
_FOUND_GOOD = WeakIdKeyDictionary()


def tensor(name: str, value: object, dtypes: Collection[torch.dtype]) -> None:
    """Raise TypeError unless `value` is a dense tensor of one of `dtypes`."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if value.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense (strided) tensor, got layout {value.layout}")
    if value.dtype not in dtypes:
        expected = " or ".join(str(dtype) for dtype in dtypes)
        raise TypeError(f"{name}: expected dtype {expected}, got {value.dtype}")
    if value.is_neg():  # torch negates it whenever it is read, and native code would not
        raise TypeError(
            f"{name}: expected values as they lie in memory, got a negated view; call .resolve_neg()"
        )
    if _has_lost_its_memory(value):
        raise TypeError(f"{name}: expected a tensor with data, got one whose storage has none")


def _has_lost_its_memory(value: torch.Tensor) -> bool:
    """Whether it has elements, but nowhere: FSDP frees storages, functional tensors have none."""
    if type(value) not in (torch.Tensor, torch.nn.Parameter) or not (value.is_cpu or value.is_cuda):
        return False
    if value.numel() == 0 or torch._C._functorch.is_functorch_wrapped_tensor(value):
        return False
    return value.data_ptr() == 0


def count(name: str, value: object) -> None:
    """Raise unless `value` is a whole number that is not negative, or what torch.compile puts in its place."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name}: expected a whole number, got {value!r}")
    if value < 0:
        raise ValueError(f"{name}: expected a number of at least 0, got {value}")


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


def on_cpu(name: str, value: torch.Tensor) -> None:
    """Raise ValueError unless `value` lies in the memory of the CPU."""
    if not value.is_cpu:
        raise ValueError(f"{name}: expected device cpu, got {value.device}")


def contiguous_on_cpu(name: str, value: torch.Tensor) -> None:
    """Raise ValueError unless `value` lies in the memory of the CPU without gaps."""
    on_cpu(name, value)
    if not value.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor, got strides {list(value.stride())}")


def is_plain_float32(value: object) -> TypeGuard[torch.Tensor]:
    """Whether it is a float32 tensor that `tensor` and `contiguous_on_cpu` find good, in a microsecond."""
    return (
        isinstance(value, torch.Tensor)
        and value.dtype == torch.float32
        and value.is_cpu
        and value.layout == torch.strided
        and value.is_contiguous()
        and not value.is_neg()
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


def rows(x: torch.Tensor) -> int:
    """How many rows [..., K] has."""
    return math.prod(x.shape[:-1])


def gradient_needed(*tensors: object) -> bool:
    """Whether autograd will need a backward of an operation on these arguments, checked or not."""
    if torch.is_grad_enabled():
        for each in tensors:
            if isinstance(each, torch.Tensor) and each.requires_grad:
                return True
    return False


def no_tangent(operation: str, *tensors: object) -> None:
    """Raise RuntimeError if one of these has a forward-mode derivative, which native code would lose."""
    if forward_ad._current_level >= 0 and any(
        isinstance(each, torch.Tensor) and forward_ad.unpack_dual(each).tangent is not None
        for each in tensors
    ):
        raise RuntimeError(f"{operation} has no forward-mode derivative")


def no_gradient_needed(operation: str, *tensors: torch.Tensor | None) -> None:
    """Raise RuntimeError if autograd would need a derivative of this operation."""
    no_tangent(operation, *tensors)
    if gradient_needed(*tensors):
        raise RuntimeError(f"{operation} has no backward; call it under torch.no_grad()")


def capturing(x: torch.Tensor) -> bool:
    """Whether a CUDA graph is being captured, within which no value can be read."""
    return x.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def contents(check: Callable[..., None], name: str, value: torch.Tensor, *arguments: object) -> None:
    """`check(name, value, *arguments)`, a check that reads values; on a GPU once for every state of a tensor.

    There it waits for all that is queued, which would cost more than the operation. A tensor that was found good is
    not read again until torch knows that it was written; nothing is read while a graph is captured.
    """
    if value.device.type == "cpu":
        check(name, value, *arguments)
        return
    if value.is_meta:
        raise ValueError(f"{name}: expected a tensor with data, got one on the meta device")
    if capturing(value):
        return
    if value.is_inference():  # torch counts no versions
        check(name, value, *arguments)
        return
    state = (check, value._version, value.data_ptr(), value.shape, *arguments)
    found: set[tuple[object, ...]] = _FOUND_GOOD.get(value, set())
    if state not in found:
        check(name, value, *arguments)
        _FOUND_GOOD[value] = {each for each in found if each[1] == value._version} | {state}
