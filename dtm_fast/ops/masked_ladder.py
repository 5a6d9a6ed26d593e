"""masked_linear for nested masks: each output continues the sums of the next sparser one."""

import torch

from dtm_fast.ops import native
from dtm_fast.ops.autocast import without_autocast
from dtm_fast.ops.mask_bits import unpack_mask_reference


def check_nested(name: str, mask: torch.Tensor) -> None:
    """Raise ValueError unless each mask keeps a part of what the mask before it keeps."""
    added = mask[1:] & ~mask[:-1]
    if bool(added.any()):
        first = int(added.flatten(1).any(1).nonzero()[0])
        raise ValueError(
            f"{name}: expected nested masks, each keeping a part of what the mask before it keeps; "
            f"{name}[{first + 1}] keeps what {name}[{first}] does not"
        )


@without_autocast
def masked_ladder_reference(
    x: torch.Tensor, weight: torch.Tensor, mask: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """The reference twin: each output from the columns of x that its row keeps, and from no others."""
    wide_x, wide_weight = x.float(), weight.float()
    y = wide_x.new_empty((len(mask), *x.shape[:-1], len(weight)))
    levels = [
        torch.stack([wide_x[..., kept] @ row[kept] for row, kept in zip(wide_weight, level, strict=True)], -1)
        for level in unpack_mask_reference(mask, weight.shape[1])
        if len(weight)
    ]
    if levels:
        y = torch.stack(levels)
    return (y if bias is None else y + bias.float()).to(x.dtype)


def masked_ladder_cpu(
    x: torch.Tensor, weight: torch.Tensor, mask: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """The native kernels."""
    cpu, isa, threads = native.cpu_call()
    rows, weight = native.as_rows(x), native.as_rows(weight)
    if mask.stride(-1) != 1:
        mask = mask.contiguous()
    bias = None if bias is None else bias.float().contiguous()
    levels, (columns, depth) = len(mask), weight.shape
    y = x.new_empty((levels, *x.shape[:-1], columns))
    cpu.masked_ladder(
        isa,
        threads,
        native.FLOAT_TYPES[x.dtype],
        rows.data_ptr(),
        rows.stride(0),
        weight.data_ptr(),
        weight.stride(0),
        mask.data_ptr(),
        mask.stride(1),
        mask.stride(0),
        native.address(bias),
        levels,
        rows.shape[0],
        columns,
        depth,
        y.data_ptr(),
    )
    return y
