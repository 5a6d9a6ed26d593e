"""sparse_linear beside the dense product and beside torch's own sparse matrices."""

import warnings
from collections.abc import Callable

import torch

from benchmarks import torch_peers
from benchmarks.case import OURS, OUT_OF_CACHE_BYTES, Case, Contest
from benchmarks.correctness import relative_error
from benchmarks.goals import Goal
from benchmarks.interleave import Contender, prepared
from benchmarks.limits import INSTRUCTIONS
from dtm_fast import ops
from dtm_fast.ops import large_pages

OPERATION = "sparse_linear"
DENSE, ONEDNN, ONEDNN_TENSORS, CSR = "F.linear", "oneDNN", "aten::mkldnn_linear", "torch.sparse CSR"
# Packed weights lie there; torch puts its tensors there only where THP_MEM_ALLOC_ENABLE=1 is set.
ON_LARGE_PAGES = "F.linear on large pages"
SHAPES = [(2048, 576, 576), (2048, 576, 1536), (2048, 1536, 576), (2048, 4096, 4096), (1, 4096, 4096)]
# Density: how many times as fast as the dense product, with many tokens and with one.
GOALS = {0.5: (1.0, 1.6), 0.25: (2.0, 3.0), 0.1: (4.0, 6.0), 0.05: (7.0, 9.0)}
_VALUE_BYTES, _COLUMN_BYTES = 4, 1  # what a kept entry takes at least in the packed weight
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-3}


def cases() -> list[Case]:
    """Float32 in all shapes and densities; bfloat16, for which there are no goals, in two."""
    return [_case(*shape, density, torch.float32) for shape in SHAPES for density in GOALS] + [
        _case(*shape, 0.1, torch.bfloat16) for shape in (SHAPES[1], SHAPES[-1])
    ]


def _case(M: int, K: int, N: int, density: float, dtype: torch.dtype) -> Case:  # noqa: N803
    many, one = GOALS[density]
    if dtype != torch.float32:
        goals: tuple[Goal, ...] = ()
    elif M == 1:
        goals = (Goal(f"≥ {one:g} × F.linear on the dense weight", "speed", (DENSE,), one),)
    else:
        goals = (Goal(f"≥ {many:g} × dense oneDNN float32", "speed", (ONEDNN, ONEDNN_TENSORS), many),)
    return Case(
        OPERATION,
        M,
        K,
        N,
        dtype,
        _build,
        flops=2.0 * M * K * N * density,
        bytes=N * K * density * (_VALUE_BYTES + _COLUMN_BYTES) + float(dtype.itemsize * M * (K + N)),
        arithmetic=INSTRUCTIONS[torch.float32],
        goals=goals,
        sparsity=1 - density,
        note=f"density {density:g}" + (", weights out of cache" if M == 1 else ""),
        out_of_cache=OUT_OF_CACHE_BYTES if M == 1 else 0,
        extra=_size,
    )


def _weight(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """The weight [N, K] in float32 and which of its entries are kept."""
    generator = torch.Generator().manual_seed(case.M + case.N)
    weight = torch.randn(case.N, case.K, generator=generator)
    return weight, torch.rand(case.N, case.K, generator=generator) >= case.sparsity


def _size(case: Case) -> dict[str, float | str]:
    """The packed weight in bytes, in all and per kept entry: every call reads all of it."""
    weight, kept = _weight(case)
    packed = ops.SparseWeight.pack(weight, ops.pack_mask(kept))
    return {
        "weight bytes": float(packed.nbytes),
        "bytes per kept entry": packed.nbytes / max(packed.nnz, 1),
    }


def csr(x: torch.Tensor, weight: torch.Tensor) -> Callable[[], torch.Tensor]:
    """`csr @ x.T`, turned back: torch's product of a sparse matrix and a dense one (MKL)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch says that its CSR tensors are in beta state
        sparse = weight.to_sparse_csr()
    return lambda: (sparse @ x.T).T


def _build(case: Case) -> Contest:
    weight, kept = _weight(case)
    masked = torch.where(kept, weight, 0).to(case.dtype)
    x = torch.randn(case.M, case.K, generator=torch.Generator().manual_seed(1)).to(case.dtype)
    mask = ops.pack_mask(kept)
    packed = ops.SparseWeight.pack(masked, mask)
    expected = (x.double() @ masked.double().T).to(case.dtype)
    complaint = relative_error(_TOLERANCE[case.dtype])
    ours = [packed] + [ops.SparseWeight.pack(masked, mask) for _ in range(case.copies(packed.nbytes) - 1)]
    contenders = [Contender(OURS, tuple(lambda w=w: ops.sparse_linear(x, w) for w in ours), complaint)]

    def dense_complaint(result: torch.Tensor, wanted: torch.Tensor) -> str | None:
        return complaint(result.to_dense() if result.layout == torch._mkldnn else result, wanted)

    dense = [masked, *(masked.clone() for _ in range(case.copies(masked.nbytes) - 1))]
    for name, prepare in (
        (DENSE, torch_peers.dense),
        (ONEDNN, torch_peers.onednn),
        (ONEDNN_TENSORS, torch_peers.onednn_tensors),
    ):
        contenders.append(
            prepared(name, [lambda w=w, p=prepare: p(x, w) for w in dense], dense_complaint)  # type: ignore[misc]
        )
    if case.M == 1:
        moved = [lambda w=w: torch_peers.dense(x, large_pages.moved(w)) for w in dense]  # type: ignore[misc]
        contenders.append(prepared(ON_LARGE_PAGES, moved, complaint))
    csr_bytes = int(kept.sum()) * (case.dtype.itemsize + 8)  # 8: the type of its columns is int64
    contenders.append(prepared(CSR, [lambda: csr(x, masked)] * case.copies(csr_bytes), complaint))
    return Contest(contenders, expected)
