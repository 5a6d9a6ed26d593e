"""unpack_mask beside compositions of torch, as a share of what a copy on this GPU reaches."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.correctness import bit_equal
from benchmarks.cuda.graph_timing import Captured, medians
from dtm_fast.ops import native
from dtm_fast.ops.mask_bits import unpack_mask_reference

# [N, K]: SmolLM2's up projection, Llama 3's of 8B, of 70B, and one whose rows end within a byte.
SHAPES = ((1536, 576), (14336, 4096), (28672, 8192), (14336, 4093))
_TOGETHER = 500 * 2**20  # bytes of masks in turn: ten times the second-level cache
_MOST = 256
_COPIED = 2**31


def copy_limit() -> float:
    """Bytes read and written in a second by the fastest of several large copies on the device."""
    sources = [torch.randint(0, 256, (_COPIED,), dtype=torch.uint8, device="cuda") for _ in range(2)]
    targets = [torch.empty_like(each) for each in sources]
    copies = [partial(target.copy_, source) for target, source in zip(targets, sources, strict=True)]
    return 2 * _COPIED / medians({"copy": Captured(copies)})["copy"]["median_s"]


def kernel(packed: Tensor, columns: int) -> Tensor:
    """Our kernel alone, as ``ops.unpack_mask(backend="cuda")`` starts it."""
    module, reason = native.load("_cuda")
    if module is None:
        raise RuntimeError(reason)
    mask = torch.empty((len(packed), columns), dtype=torch.bool, device=packed.device)
    stream = torch.cuda.current_stream().cuda_stream
    module.unpack_mask(packed.data_ptr(), len(packed), columns, mask.data_ptr(), stream)
    return mask


def by_bitwise_and(bits: Tensor, packed: Tensor, columns: int) -> Tensor:
    """The shortest that torch has for it: two kernels."""
    found: Tensor = torch.bitwise_and(packed[..., None], bits).ne(0)
    return found.flatten(-2)[..., :columns]


def contenders() -> dict[str, Callable[[Tensor, int], Tensor]]:
    bits = torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8, device="cuda")
    return {
        "dtm_fast": kernel,
        "torch: the twin's shifts": unpack_mask_reference,
        "torch: bitwise_and, ne": partial(by_bitwise_and, bits),
    }


def row(rows: int, columns: int, limit: float) -> dict[str, Any]:
    """One size: correctness of every result of the last replay, then times."""
    count = min(_MOST, -(-_TOGETHER // (rows * columns)))
    row_bytes = -(-columns // 8)
    packed = [
        torch.randint(0, 256, (rows, row_bytes), dtype=torch.uint8, device="cuda") for _ in range(count)
    ]
    if columns % 8:
        for each in packed:
            each[:, -1] &= 2 ** (columns % 8) - 1
    captured, wrong = {}, {}
    for name, call in contenders().items():
        captured[name] = Captured([partial(call, each, columns) for each in packed])
        for result in captured[name].results:
            result.fill_(True)  # what is not written anew shows
        captured[name].replay()
        for result, each in zip(captured[name].results, packed, strict=True):
            complaint = bit_equal(result, unpack_mask_reference(each, columns))
            if complaint is not None:
                wrong[name] = complaint
    times = medians(captured)
    moved = rows * (row_bytes + columns)
    for each in times.values():
        each["gbps"] = moved / each["median_s"] / 1e9
        each["share_of_copy"] = moved / each["median_s"] / limit
    ours = times["dtm_fast"]["median_s"]
    return {
        "N": rows,
        "K": columns,
        "buffers": count,
        "bytes": moved,
        "contenders": times,
        "speedup_vs": {name: each["median_s"] / ours for name, each in times.items() if name != "dtm_fast"},
        "wrong": wrong,
    }


def run() -> dict[str, Any]:
    """All sizes."""
    torch.manual_seed(0)
    limit = copy_limit()
    torch.cuda.empty_cache()
    rows = []
    for shape in SHAPES:
        rows.append(row(*shape, limit))
        torch.cuda.empty_cache()
    return {"copy_gbps": limit / 1e9, "rows": rows}


def lines(report: dict[str, Any]) -> list[str]:
    """The table, as text."""
    found = [f"copy on the device: {report['copy_gbps']:.0f} GB/s, read and written"]
    for each in report["rows"]:
        times = ", ".join(
            f"{name} {value['median_s'] * 1e6:.1f} us = {value['gbps']:.0f} GB/s ({value['share_of_copy']:.0%})"
            for name, value in each["contenders"].items()
        )
        verdict = f"WRONG {each['wrong']}" if each["wrong"] else "right"
        found.append(f"unpack_mask [{each['N']}, {each['K']}]: {times}; {verdict}")
    return found
