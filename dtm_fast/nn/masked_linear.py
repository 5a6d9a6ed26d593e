"""Linear layer of which a mask keeps some weights."""

import torch
from torch import nn

from dtm_fast import ops
from dtm_fast.nn.linear_layer import LinearLayer, autocast_dtype
from dtm_fast.ops import checks
from dtm_fast.ops.mask_bits import check_packed


class MaskedLinear(LinearLayer):
    """Multiplies by the weights that a mask keeps: `ops.masked_linear` as a layer.

    `weight` [N, K] and `bias` [N] are parameters, `mask` is a buffer, one bit per weight: uint8
    [N, ceil(K / 8)], as `ops.pack_mask` makes it. It trains: the gradient of a weight that is masked out is
    exactly 0. The weight itself stays whole, so several layers may share one and mask it differently.

    Args:
        in_features: K.
        out_features: N.
        bias: whether there is one.
        device: of parameters and mask.
        dtype: of the parameters, float32 or bfloat16, which the input must have; None is torch's default.

    Parameters start as those of torch.nn.Linear, and the mask keeps them all.
    """

    uncast = ("mask",)

    weight: torch.Tensor
    mask: torch.Tensor
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """See the class."""
        super().__init__(in_features, out_features)
        linear = nn.Linear(in_features, out_features, bias, device, dtype)
        self.weight = linear.weight
        self.register_parameter("bias", linear.bias)
        kept = torch.ones(linear.weight.shape, dtype=torch.bool, device=linear.weight.device)
        self.register_buffer("mask", ops.pack_mask(kept))

    @classmethod
    def from_linear(cls, linear: nn.Linear, mask: torch.Tensor | None = None) -> "MaskedLinear":
        """Puts a mask on a layer; weight and bias are shared with it, not copied.

        Args:
            linear: float32 or bfloat16; not changed.
            mask: bool [N, K], True where a weight is kept, or packed, uint8 [N, ceil(K / 8)] (shared, too);
                None keeps all. `linear.weight != 0` keeps what a pruned layer still has.

        Raises:
            TypeError: linear is no torch.nn.Linear of such a dtype, or mask is neither bool nor uint8.
            ValueError: shape or device of the mask does not fit, or it has bits set beyond K.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear: expected a torch.nn.Linear, got {type(linear).__name__}")
        checks.tensor("linear.weight", linear.weight, (torch.float32, torch.bfloat16))
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        layer.weight, layer.bias = linear.weight, linear.bias
        if mask is None:
            mask = torch.ones(linear.weight.shape, dtype=torch.bool, device=linear.weight.device)
        layer.mask = _packed(mask, linear.weight)
        return layer.train(linear.training)

    def to_linear(self) -> nn.Linear:
        """The torch.nn.Linear of a copy of the weight that is zero where it is masked out."""
        bias = None if self.bias is None else self.bias.detach().clone()
        return self.linear_of(ops.apply_mask(self.weight.detach(), self.mask), bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`ops.masked_linear(x, weight, mask, bias)`: [..., K] in the dtype of weight to [..., N].

        Under torch.autocast all are cast to its dtype first, as torch.nn.Linear does.
        """
        weight: torch.Tensor = self.weight
        dtype = autocast_dtype(x)
        if dtype is not None:
            weight = weight.to(dtype)
        x, bias = self.autocast(x)
        return ops.masked_linear(x, weight, self.mask, bias)


def _packed(mask: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The mask of a weight [N, K] in one bit each, whichever way it is given."""
    checks.tensor("mask", mask, (torch.bool, torch.uint8))
    checks.dims("mask", mask, "[N, K] or, packed, [N, ceil(K / 8)]", 2)
    checks.size("mask", mask, 0, weight.shape[0], "N of linear")
    checks.same_device("linear", weight, mask=mask)
    if mask.dtype == torch.bool:
        checks.size("mask", mask, 1, weight.shape[1], "K of linear")
        return ops.pack_mask(mask)
    check_packed("mask", mask, weight.shape[1])
    checks.padding_bits_zero("mask", mask, weight.shape[1])
    return mask
