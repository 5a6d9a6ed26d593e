"""The masks of pruned components, in a file of their own beside the checkpoint."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dtm_fast import ops
from dtm_fast.errors import ModelError
from dtm_fast.model.soundness import first_line

MASKS = "masks.safetensors"
METADATA = {"format": "dtm-bitmask", "version": "1", "bitorder": "little"}
_SUFFIX = ".mask"  # as the buffer of nn.MaskedLinear is called


def write_masks(folder: Path, masks: Mapping[str, Tensor]) -> None:
    """Writes ``folder/masks.safetensors``: ``PATH.mask``, uint8 [N, ceil(K / 8)] as ``ops.pack_mask`` makes it.

    Args:
        folder: exists.
        masks: component → bool [N, K], True where a weight is not 0.
    """
    tensors = {f"{path}{_SUFFIX}": ops.pack_mask(mask.cpu()) for path, mask in masks.items()}
    save_file(tensors, folder / MASKS, metadata=METADATA)


def read_masks(folder: Path) -> dict[str, Tensor]:
    """Component → packed mask; empty where the folder has none.

    Raises:
        ModelError: the file is damaged, or of another format.
    """
    file = folder / MASKS
    if not file.is_file():
        return {}
    try:
        with safe_open(file, framework="pt") as stored:
            if (stored.metadata() or {}) | METADATA != stored.metadata():
                raise ModelError(f"{file}: not the masks of dtm_fast: metadata {stored.metadata()}")
            return {
                name.removesuffix(_SUFFIX): stored.get_tensor(name)
                for name in stored.keys()  # noqa: SIM118 - no mapping
            }
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file}: damaged or truncated: {first_line(error)}") from error


def check_mask(packed: Tensor, weight: Tensor, exact: bool = True) -> str | None:
    """Why ``packed`` is not the mask of what is not 0 in ``weight`` [N, K]; None if it is.

    Unless ``exact``, what the mask keeps may be 0: a cast of the weight may have rounded it.
    """
    n, k = weight.shape
    if packed.dtype != torch.uint8 or packed.shape != (n, (k + 7) // 8):
        return f"its mask is {packed.dtype} {list(packed.shape)}, not uint8 {[n, (k + 7) // 8]}"
    found = ops.pack_mask(weight != 0)
    packed = packed.to(found.device)
    wrong = packed != found if exact else (found & ~packed) != 0
    rows = int(wrong.any(dim=1).sum())
    return f"its mask disagrees with the zeros of its weight in {rows} of {n} rows" if rows else None
