"""What the inputs of a component are like, summed over the tokens of a calibration."""

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor


class InputStatistics:
    """Sums over the input vectors x [K] of a component, one for each token; kept on the CPU, read when asked for.

    Args:
        identity: the same for the same sums.
        count: tokens.
        width: K.
        read: gives ``"squared_norm"`` or ``"gram"``.
    """

    def __init__(self, identity: str, count: int, width: int, read: Callable[[str], Tensor]) -> None:
        """Reads nothing yet."""
        self.identity = identity
        self.count = count
        self.width = width
        self._read = read

    @classmethod
    def of(cls, x: Tensor) -> "InputStatistics":
        """Those of the inputs ``x`` themselves.

        Args:
            x: float [..., K], finite.
        """
        sums = InputSums(x.shape[-1])
        sums.add(x)
        return sums.statistics(hashlib.sha256(sums.gram.numpy().data).hexdigest())

    @property
    def squared_norm(self) -> Tensor:
        """``X.square().sum(0)`` of all inputs X [count, K]: float32 [K]; its root is Wanda's ‖X_j‖₂."""
        return self._read("squared_norm")

    @property
    def gram(self) -> Tensor:
        """``X.T @ X`` of all inputs X [count, K], the sum and not the mean over tokens: float32 [K, K]."""
        return self._read("gram")


class InputSums:
    """The sums of ``InputStatistics`` as they grow.

    The products of one call of ``add`` are summed in float32 by torch's matrix product, the sums of all calls in
    float64.

    Args:
        width: K.
    """

    def __init__(self, width: int) -> None:
        """Of no token yet."""
        self.count = 0
        self.squared_norm = torch.zeros(width, dtype=torch.float64)
        self.gram = torch.zeros(width, width, dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        """Adds the inputs ``x``, float [..., K] on any device.

        Raises:
            ValueError: one is NaN or infinite, or too large to be squared in float32; nothing is added.
        """
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        gram = rows.t() @ rows
        if not bool(gram.diagonal().isfinite().all()):
            raise ValueError("not finite, or too large to be squared")
        self.count += len(rows)
        self.squared_norm += rows.square().sum(0, dtype=torch.float64).cpu()
        self.gram += gram.cpu()

    def statistics(self, identity: str) -> InputStatistics:
        """What was added so far, rounded to float32; it may be read while more is added."""
        known = {"squared_norm": self.squared_norm.float(), "gram": self.gram.float()}
        return InputStatistics(identity, self.count, len(self.gram), known.__getitem__)
