"""What the layers that stand in for torch.nn.Linear share."""

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import nn


def autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    """What torch.autocast casts x to; None where it leaves x as it is, is off, or is not, as on meta."""
    device = x.device.type
    if x.dtype == torch.float64 or not x.is_floating_point():
        return None
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


class LinearLayer(nn.Module):
    """The sizes and the bias of a torch.nn.Linear; buffers that keep their values when the layer is cast."""

    uncast: ClassVar[tuple[str, ...]] = ()
    """Names of the buffers that `.to(dtype)` and its kin move, but do not cast."""

    in_features: int
    out_features: int
    bias: torch.Tensor | None

    def __init__(self, in_features: int, out_features: int) -> None:
        """See the class."""
        super().__init__()
        self.in_features, self.out_features = in_features, out_features

    def linear_of(self, weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
        """A torch.nn.Linear that owns these two, in the mode of this layer."""
        linear = nn.Linear(self.in_features, self.out_features, bias is not None, device="meta")
        linear.weight = nn.Parameter(weight)
        if bias is not None:
            linear.bias = nn.Parameter(bias)
        return linear.train(self.training)

    def autocast(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x and the bias, under torch.autocast in its dtype, as torch.nn.Linear casts them."""
        dtype = autocast_dtype(x)
        if dtype is None:
            return x, self.bias
        return x.to(dtype), None if self.bias is None else self.bias.to(dtype)

    def extra_repr(self) -> str:
        """The sizes, as torch.nn.Linear prints them."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        )

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "LinearLayer":
        before = {name: getattr(self, name) for name in self.uncast}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in before.items():
            moved = getattr(self, name)
            if moved.dtype != buffer.dtype:
                setattr(self, name, buffer.to(moved.device))
        return self
