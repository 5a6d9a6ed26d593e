"""Linear layer over the kept entries of a pruned weight, for inference."""

from typing import Any

import torch
from torch import nn

from dtm_fast import ops
from dtm_fast.nn.linear_layer import LinearLayer
from dtm_fast.ops import checks
from dtm_fast.ops.library import is_recorded
from dtm_fast.ops.sparse_linear import packed_sparse_linear

_PACKED = ("values", "columns", "rows", "steps")


class SparseLinear(LinearLayer):
    """Multiplies by the kept entries of a weight, packed once: `ops.sparse_linear` as a layer.

    Its state is the packed weight (`values`, `columns`, `rows`, `steps`, as SparseWeight describes them) and
    `bias` [N]. All are buffers: nothing here is trained, and where autograd would need a gradient through the
    layer, it raises. Casting (`.to(dtype)`, `.half()`, `.type(dtype)`) casts the bias only, which must be in the
    dtype of the input. A state with more or fewer kept entries than the layer has loads as well; it is checked
    whole, and a part of a packed weight is refused.

    Args:
        in_features: K.
        out_features: N.
        bias: whether there is one.
        device: of the buffers.
        dtype: of the bias; None is torch's default.

    Nothing is kept until a state is loaded; `from_linear` makes a layer out of another. On a GPU, where activations and
    weight are bfloat16, it multiplies by `ops.bitmap_linear`, of the weight packed a second time.
    """

    uncast = _PACKED

    values: torch.Tensor
    columns: torch.Tensor
    rows: torch.Tensor
    steps: torch.Tensor

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
        empty = ops.SparseWeight.empty(out_features, in_features, device)
        for name in _PACKED:
            self.register_buffer(name, getattr(empty, name))
        self.register_buffer("bias", torch.zeros(out_features, dtype=dtype, device=device) if bias else None)
        self._known_bitmap: tuple[torch.Tensor, int, ops.BitmapWeight | None] | None = None

    @classmethod
    def from_linear(cls, linear: nn.Linear, mask: torch.Tensor | None = None) -> "SparseLinear":
        """Packs the weight of `linear` that a mask keeps; without a mask, what is not 0.

        Args:
            linear: float32 or bfloat16; not changed. The bias is copied.
            mask: bool [N, K], or packed by ops.pack_mask, uint8 [N, ceil(K / 8)]; None keeps what is not 0.

        Raises:
            TypeError: linear is no torch.nn.Linear of such a dtype, or mask is neither bool nor uint8.
            ValueError: shape or device of the mask does not fit, or it has bits set beyond K.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear: expected a torch.nn.Linear, got {type(linear).__name__}")
        if mask is not None:
            checks.tensor("mask", mask, (torch.bool, torch.uint8))
        if mask is not None and mask.dtype == torch.bool:
            if mask.shape != linear.weight.shape:
                raise ValueError(f"mask: expected shape {list(linear.weight.shape)}, got {list(mask.shape)}")
            mask = ops.pack_mask(mask)
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        packed = ops.SparseWeight.pack(linear.weight, mask)
        for name in _PACKED:
            setattr(layer, name, getattr(packed, name))
        if linear.bias is not None:
            layer.bias = linear.bias.detach().clone()
        return layer.train(linear.training)

    @property
    def weight(self) -> ops.SparseWeight:
        """The packed weight, checked."""
        return ops.SparseWeight(
            self.values, self.columns, self.rows, self.steps, self.out_features, self.in_features
        )

    def to_linear(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """The torch.nn.Linear of the weight with 0 where nothing is kept; None is torch's default dtype."""
        dtype = dtype or torch.get_default_dtype()
        bias = None if self.bias is None else self.bias.to(dtype, copy=True)
        return self.linear_of(self.weight.to_dense().to(dtype), bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`ops.sparse_linear(x, weight, bias)`: [..., K], float32 or bfloat16, to [..., N].

        Under torch.autocast x and bias are cast to its dtype first, as torch.nn.Linear does.
        """
        x, bias = self.autocast(x)
        if x.is_cuda and x.dtype == torch.bfloat16 and not is_recorded():
            bitmap = self._bitmap()
            if bitmap is not None:
                return ops.bitmap_linear(x, bitmap, bias)
        packed = (self.values, self.columns, self.rows, self.steps)
        return packed_sparse_linear(x, *packed, self.out_features, self.in_features, bias)

    def _bitmap(self) -> ops.BitmapWeight | None:
        """The weight as the GPU's kernel reads it, packed anew when it has changed; None if it is no bfloat16."""
        values = self.values
        version = 0 if values.is_inference() else values._version
        if (
            self._known_bitmap is None
            or self._known_bitmap[0] is not values
            or self._known_bitmap[1] != version
        ):
            dense = self.weight.to_dense()
            exact = torch.equal(dense.bfloat16().float(), dense)
            self._known_bitmap = (values, version, ops.BitmapWeight.pack(dense.bfloat16()) if exact else None)
        return self._known_bitmap[2]

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
        """Takes as many kept entries as the state has, if they are a weight of this shape and none of it is missing."""
        missing = [name for name in _PACKED if prefix + name not in state_dict]
        if 0 < len(missing) < len(_PACKED):
            together = f"{', '.join(_PACKED[:-1])} and {_PACKED[-1]} come together"
            names = ", ".join(prefix + name for name in missing)
            error_msgs.append(f"{names}: missing; {together}")
            own, others = {prefix + name for name in _PACKED}, list[str]()
            rest = {key: value for key, value in state_dict.items() if key not in own}
            super()._load_from_state_dict(
                rest, prefix, local_metadata, strict, others, unexpected_keys, error_msgs
            )
            missing_keys += [key for key in others if key not in state_dict]
            return
        if not missing:
            packed: list[torch.Tensor] = [state_dict[prefix + name] for name in _PACKED]
            values, columns, rows, steps = packed
            try:
                ops.SparseWeight(values, columns, rows, steps, self.out_features, self.in_features)
            except (TypeError, ValueError) as error:
                error_msgs.append(f"{prefix}{error}")
                return
            for name, each in zip(_PACKED, packed, strict=True):
                setattr(self, name, getattr(self, name).new_empty(each.shape))
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
