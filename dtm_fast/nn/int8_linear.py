"""Linear layer with int8 weights, for inference."""

from typing import Any

import torch
from torch import nn

from dtm_fast import ops
from dtm_fast.nn.linear_layer import LinearLayer
from dtm_fast.ops import large_pages


class Int8Linear(LinearLayer):
    """Multiplies by int8 weights and quantizes its input per token: `ops.int8_linear` as a layer.

    Its state is that of an int-quantized layer of compressed-tensors (W8A8, dynamic per token): `weight` int8
    [N, K], `weight_scale` float32 [N, 1] and `bias` [N]; such a checkpoint loads as it is, and vLLM reads what
    this saves. All three are buffers: nothing here is trained, and where autograd would need a gradient through
    the layer, it raises. Casting (`.to(dtype)`, `.half()`) casts the bias only; it must be in the dtype of the
    input, or float32. `weight.dtype` is torch.int8, which Hugging Face models know from bitsandbytes.

    Args:
        in_features: K, at most 131071.
        out_features: N.
        bias: whether there is one.
        device: of the buffers.
        dtype: of the bias; None is torch's default.

    The weights are zeros until they are loaded; `from_linear` makes a layer out of another.
    """

    uncast = ("weight", "weight_scale")

    weight: torch.Tensor
    weight_scale: torch.Tensor  # [N, 1], not [N]: the shape in the checkpoints that others write and read

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
        self.register_buffer(
            "weight", torch.zeros(out_features, in_features, dtype=torch.int8, device=device)
        )
        self.register_buffer("weight_scale", torch.ones(out_features, 1, dtype=torch.float32, device=device))
        self.register_buffer("bias", torch.zeros(out_features, dtype=dtype, device=device) if bias else None)

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> "Int8Linear":
        """Quantizes the weight of `linear` per output channel, as `ops.quantize_int8` does.

        Args:
            linear: float32, bfloat16 or float16; not changed. The bias is copied.

        Raises:
            TypeError: linear is no torch.nn.Linear of such a dtype.
            ValueError: its weight holds a NaN or an infinity.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear: expected a torch.nn.Linear, got {type(linear).__name__}")
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        qweight, scale = ops.quantize_int8(linear.weight)
        layer.weight = large_pages.moved(qweight)
        layer.weight_scale = scale[:, None]
        if linear.bias is not None:
            bias = linear.bias.detach()  # of float16 the layer takes neither inputs nor a bias
            layer.bias = bias.float() if bias.dtype == torch.float16 else bias.clone()
        return layer.train(linear.training)

    def to_linear(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """The torch.nn.Linear of `(weight * weight_scale).to(dtype)`; None is torch's default dtype."""
        dtype = dtype or torch.get_default_dtype()
        bias = None if self.bias is None else self.bias.to(dtype, copy=True)
        return self.linear_of((self.weight.float() * self.weight_scale).to(dtype), bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`ops.int8_linear(x, weight, weight_scale, bias)`: [..., K], float32 or bfloat16, to [..., N].

        Under torch.autocast x and bias are cast to its dtype first, as torch.nn.Linear does.
        """
        x, bias = self.autocast(x)
        return ops.int8_linear(x, self.weight, self.weight_scale.squeeze(1), bias)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Takes scales of any dtype, as checkpoints have them, and no weights but int8, which torch would cast."""
        weight, scale = state_dict.get(f"{prefix}weight"), state_dict.get(f"{prefix}weight_scale")
        if weight is not None and weight.dtype != torch.int8:
            error_msgs.append(f"{prefix}weight: expected dtype torch.int8, got {weight.dtype}")
            return
        if scale is not None:
            state_dict[f"{prefix}weight_scale"] = scale.float()
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
