"""Tensors that are read many times: left where they are up to a bound, beyond it where there is more room."""

import os
import tempfile
from collections.abc import Hashable
from pathlib import Path

import torch
from torch import Tensor

from dtm_fast.errors import MeasurementError
from dtm_fast.measure.free_memory import free_memory


class TensorStore:
    """Keeps tensors by key. What does not fit into memory goes to a temporary file and is mapped from there.

    Memory is that of the device on which a tensor is. What does not fit into a GPU's goes to page-locked memory of the
    host, from where it comes back without the host's waiting, as long as it takes no more than half of what is free
    there, and else to the file. The file has no name, so that nothing is left of it however the process ends.

    Args:
        bound: bytes to keep in memory at most; None for no bound.
        folder: where the file goes; by default where temporary files go.
    """

    def __init__(self, bound: int | None = None, folder: Path | None = None) -> None:
        """Holds nothing yet."""
        self._bound = bound
        self._folder = folder
        self._known: dict[Hashable, tuple[Tensor, torch.device]] = {}
        self.in_memory = 0
        """Bytes kept in memory."""
        self.pinned = 0
        """Bytes kept in page-locked memory of the host."""
        self.spilled = 0
        """Bytes kept in the file."""

    def __contains__(self, key: Hashable) -> bool:
        """Whether a tensor is kept under this key."""
        return key in self._known

    def __getitem__(self, key: Hashable) -> Tensor:
        """The tensor kept under this key, on the device from which it came; it must not be written to."""
        kept, device = self._known[key]
        return kept.to(device, non_blocking=True)  # whoever reads it is behind the copy on the same stream

    def put(self, key: Hashable, value: Tensor) -> Tensor:
        """Keeps ``value`` (itself, or where it is spilled a copy on the CPU) and returns what is kept.

        Raises:
            MeasurementError: the disk has no room for what memory does not hold.
        """
        size = value.numel() * value.element_size()
        if self._bound is None or self.in_memory + size <= self._bound:
            kept = value
            self.in_memory += size
        elif value.device.type == "cuda" and size <= free_memory(torch.device("cpu")) // 2:
            kept = torch.empty(value.shape, dtype=value.dtype, pin_memory=True).copy_(value)
            self.pinned += size
        else:
            kept = self._mapped(value.contiguous(), size)
            self.spilled += size
        self._known[key] = kept, value.device
        return kept

    def _mapped(self, value: Tensor, size: int) -> Tensor:
        if size == 0:
            return value
        try:
            with tempfile.TemporaryFile(dir=self._folder) as file:
                # Room is taken now: writing to a mapped page that finds none later would kill the process.
                os.posix_fallocate(file.fileno(), 0, size)
                # mmap.mmap would keep a descriptor open for each tensor, of which there may be thousands.
                name = f"/proc/self/fd/{file.fileno()}"
                pages = torch.from_file(name, shared=True, size=size, dtype=torch.uint8)
        except OSError as error:
            where = self._folder or tempfile.gettempdir()
            raise MeasurementError(
                f"{where}: no room for {size / 2**20:.0f} MiB of the base's states: {error.strerror}; more memory "
                "(--memory) or another folder (TMPDIR) would do"
            ) from error
        return pages.view(value.dtype).view(value.shape).copy_(value)
