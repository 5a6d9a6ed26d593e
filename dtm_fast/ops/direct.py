"""Calls of CPU kernels straight with tensors, which C++ looks at in a tenth of the time that Python takes."""

import functools
from collections.abc import Callable
from typing import Any, cast

import torch
from torch.autograd import forward_ad

from dtm_fast.ops import native


def run(operation: str, *arguments: object) -> torch.Tensor | None:
    """What an operation gives for these arguments, if they need nothing but its CPU kernel.

    None where they are unusual in any way (memory, layout, gradients, sizes of 0) or wrong: then it is for the
    operation to look at them, and to say what is wrong. Arguments for which an operation ``is_recorded`` are not for
    this.
    """
    isa = native.cpu_isa()
    if isa == "reference" or forward_ad._current_level >= 0:
        return None
    kernel = _kernel(operation)
    if kernel is None:
        return None
    found = kernel(native.ISAS.index(isa), torch.get_num_threads(), torch.is_grad_enabled(), *arguments)
    return cast("torch.Tensor | None", found)


@functools.cache
def _kernel(operation: str) -> Callable[..., Any] | None:
    module = _module()
    return None if module is None else cast("Callable[..., Any]", getattr(module, f"{operation}_directly"))


@functools.cache
def _module() -> Any:
    """The native module, able to look at tensors; None where torch (before 2.10) has no table of functions for it."""
    exchange = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    module, _ = native.load("_cpu")
    if exchange is None or module is None:
        return None
    module.use_exchange(exchange, torch.Tensor, torch.nn.Parameter)
    return module
