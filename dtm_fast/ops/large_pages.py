"""Memory for weights that are packed once and then read from front to end, again and again."""

import math
import mmap
from collections.abc import Sequence
from contextlib import suppress

import torch

_PAGE = 2 * 2**20
_LEAST = 2 * _PAGE  # below, too little of it would lie on whole pages


def empty(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """``torch.empty(shape, dtype=dtype, device="cpu")`` on large pages (2 MiB), where Linux has them.

    With small ones a row of a large weight crosses a page every 4 KiB, and each has to be looked up: reading memory in
    order took 10 to 30% longer on a Xeon whose Linux gives large pages only to those who ask (``madvise``), as most do.
    torch asks for all tensors if THP_MEM_ALLOC_ENABLE=1 is set.
    """
    size = math.prod(shape) * dtype.itemsize
    if size < _LEAST or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device="cpu")
    # A mapping of its own: what malloc hands out may have been in use, on small pages, and stays on them.
    memory = mmap.mmap(-1, size + _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    start = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % _PAGE
    with suppress(OSError):  # a Linux without them
        memory.madvise(mmap.MADV_HUGEPAGE, start, size // _PAGE * _PAGE)
    return torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=start).view(dtype).view(shape)


def moved(value: torch.Tensor) -> torch.Tensor:
    """A copy on large pages of a tensor that is large enough for them and on the CPU; any other is returned itself."""
    if value.device.type != "cpu" or value.nbytes < _LEAST:
        return value
    return empty(value.shape, value.dtype).copy_(value)
