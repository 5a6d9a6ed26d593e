"""Memory for weights that are packed once and then read from front to end, again and again."""

import math
import mmap
from collections.abc import Sequence
from contextlib import suppress

import torch

_PAGE = 2 * 2**20
_LINE = 64
_MOST_WASTE = 1 / 4  # of what is asked for, to have its end on a large page, too


def empty(*parts: tuple[Sequence[int], torch.dtype]) -> list[torch.Tensor]:
    """``[torch.empty(shape, dtype=dtype) for shape, dtype in parts]`` of the CPU, side by side on large pages (2 MiB).

    Small pages are 4 KiB, and every one that is read has to be looked up: reading memory in order took 10 to 50% longer
    on a Xeon whose Linux gives large pages only to those who ask (``madvise``), as most do. torch asks for all tensors
    if THP_MEM_ALLOC_ENABLE=1 is set.
    """
    sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in parts]
    starts = [sum(-(-size // _LINE) * _LINE for size in sizes[:i]) for i in range(len(parts))]
    pages = _pages(starts[-1] + sizes[-1])
    if pages == 0 or not hasattr(mmap, "MADV_HUGEPAGE"):
        return [torch.empty(shape, dtype=dtype, device="cpu") for shape, dtype in parts]
    # A mapping of its own: what malloc hands out may have been in use, on small pages, and stays on them.
    memory = mmap.mmap(-1, (pages + 2) * _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    first = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % _PAGE
    with suppress(OSError):  # a Linux without them
        memory.madvise(mmap.MADV_HUGEPAGE, first, pages * _PAGE)

    def part(start: int, size: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        if size == 0:
            return torch.empty(shape, dtype=dtype, device="cpu")
        # Each with a storage of its own, so that whoever stores one stores no other.
        taken = torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=first + start)
        return taken.view(dtype).view(shape)

    return [part(*place, *each) for place, each in zip(zip(starts, sizes, strict=True), parts, strict=True)]


def moved(value: torch.Tensor) -> torch.Tensor:
    """A copy on large pages of a tensor that is large enough for them and on the CPU; any other is returned itself.

    So are tensors of subclasses, such as fake ones, which say that they are on the CPU and have no memory.
    """
    if value.device.type != "cpu" or type(value) is not torch.Tensor or _pages(value.nbytes) == 0:
        return value
    (room,) = empty((value.shape, value.dtype))
    return room.copy_(value)


def _pages(size: int) -> int:
    """How many pages to use for so many bytes; the rest lies on small ones."""
    whole = size // _PAGE
    return whole + 1 if 0 < (whole + 1) * _PAGE - size <= size * _MOST_WASTE else whole
