"""torch.autocast does not reach into an operation: it computes in the dtypes that it is given, whatever runs it."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

_P = ParamSpec("_P")
_T = TypeVar("_T")


def without_autocast(compute: Callable[_P, _T]) -> Callable[_P, _T]:
    """``compute`` with autocast disabled on the device of the first tensor among its arguments.

    Kernels see no autocast; torch's products, of which the reference twins are made, would round float32 to bfloat16.
    """

    @wraps(compute)
    def run(*args: _P.args, **options: _P.kwargs) -> _T:
        given = (*args, *options.values())
        device = next((each.device.type for each in given if isinstance(each, torch.Tensor)), None)
        if device is None or not torch.is_autocast_enabled(device):
            return compute(*args, **options)
        with torch.autocast(device, enabled=False):
            return compute(*args, **options)

    return run
