"""Greedy token and negative log-likelihood over the vocabulary, without the logits, in Triton."""

import torch
import triton
import triton.language as tl

from dtm_fast.ops import native
from dtm_fast.triton_kernels.tiles import tile_of
from dtm_fast.triton_kernels.tuning import Tuner, bucket, current_device_of, fits

BLOCK_V = 128  # one for all, since the order in which an nll is summed depends on it
CONFIGS = {
    torch.bfloat16: [
        triton.Config({"BLOCK_T": 128, "BLOCK_D": 64}, num_warps=8, num_stages=3),
        triton.Config({"BLOCK_T": 64, "BLOCK_D": 64}, num_warps=4, num_stages=4),
        triton.Config({"BLOCK_T": 16, "BLOCK_D": 128}, num_warps=4, num_stages=3),
    ],
    torch.float32: [
        triton.Config({"BLOCK_T": 64, "BLOCK_D": 32}, num_warps=8, num_stages=3),
        triton.Config({"BLOCK_T": 32, "BLOCK_D": 32}, num_warps=4, num_stages=3),
        triton.Config({"BLOCK_T": 16, "BLOCK_D": 32}, num_warps=4, num_stages=3),
    ],
}
MERGE_CONFIG = triton.Config({"BLOCK_TILES": 64, "BLOCK_T": 16}, num_warps=4)
_TUNER = Tuner()


@triton.jit
def rank_of(x):
    """Whole numbers that order as float32 values do: -0 equals 0, and NaN is above infinity."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(x != x, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit
def value_of(rank):
    """What rank_of ranked so."""
    return (rank ^ ((rank >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def shift_of(largest):
    """What is subtracted before exp: the largest logit, or 0 where that is infinite, as logsumexp does."""
    return tl.where(tl.abs(largest) == float("inf"), 0.0, largest)


@triton.jit
def summarize_kernel(
    hidden,
    hidden_stride,
    lm_head,
    lm_head_stride,
    reference,
    ranks,
    tokens,
    totals,
    own_logits,
    T,
    V,
    D,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A program says, for its rows and its tile of the vocabulary: the largest logit, its first token, sum exp."""
    tile_t, tile_v = tile_of(tl.program_id(0), tl.cdiv(T, BLOCK_T), tl.cdiv(V, BLOCK_V), 8)
    rows = tile_t * BLOCK_T + tl.arange(0, BLOCK_T)
    ids = tile_v * BLOCK_V + tl.arange(0, BLOCK_V)
    depth = tl.arange(0, BLOCK_D)
    left = hidden + rows.to(tl.int64)[:, None] * hidden_stride + depth[None, :]
    right = lm_head + ids.to(tl.int64)[None, :] * lm_head_stride + depth[:, None]

    sums = tl.zeros([BLOCK_T, BLOCK_V], tl.float32)
    for start in range(0, D, BLOCK_D):
        a = tl.load(left + start, (rows[:, None] < T) & (start + depth[None, :] < D), other=0.0)
        b = tl.load(right + start, (ids[None, :] < V) & (start + depth[:, None] < D), other=0.0)
        sums = tl.dot(a, b, sums, input_precision="ieee")

    # As a model that stores its logits would see them.
    logits = sums.to(hidden.dtype.element_ty).to(tl.float32)
    logits = tl.where(ids[None, :] < V, logits, float("-inf"))
    # Tokens beyond the vocabulary rank below a logit of minus infinity.
    rank = tl.where(ids[None, :] < V, rank_of(logits), -0x7FFFFFFF)
    top = tl.max(rank, 1)
    token = tl.min(tl.where(rank == top[:, None], ids[None, :], 0x7FFFFFFF), 1)
    total = tl.sum(tl.exp(logits - shift_of(value_of(top))[:, None]), 1)

    inside = rows < T
    summary = tile_v.to(tl.int64) * T + rows
    tl.store(ranks + summary, top, inside)
    tl.store(tokens + summary, token, inside)
    tl.store(totals + summary, total, inside)
    wanted = tl.load(reference + rows, inside, other=-1)
    own = tl.sum(tl.where(ids[None, :] == wanted[:, None], logits, 0.0), 1)
    tl.store(own_logits + rows, own, inside & (wanted // BLOCK_V == tile_v))


@triton.jit
def merge_kernel(
    ranks,
    tokens,
    totals,
    own_logits,
    reference,
    mismatch,
    nll,
    T,
    tiles,
    BLOCK_TILES: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """A program merges the summaries of BLOCK_T rows, in the order of the token ids."""
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    each = tl.arange(0, BLOCK_TILES)

    best = tl.full([BLOCK_T], -0x7FFFFFFF, tl.int32)
    greedy = tl.zeros([BLOCK_T], tl.int32)
    for start in range(0, tiles, BLOCK_TILES):
        inside = (start + each[:, None] < tiles) & (rows[None, :] < T)
        at = (start + each.to(tl.int64))[:, None] * T + rows[None, :]
        rank = tl.load(ranks + at, inside, other=-0x7FFFFFFF)
        token = tl.load(tokens + at, inside, other=0x7FFFFFFF)
        top = tl.max(rank, 0)
        first = tl.min(tl.where(rank == top[None, :], token, 0x7FFFFFFF), 0)
        greedy = tl.where(top > best, first, greedy)
        best = tl.maximum(best, top)

    shift = shift_of(value_of(best))
    total = tl.zeros([BLOCK_T], tl.float32)
    for start in range(0, tiles, BLOCK_TILES):
        inside = (start + each[:, None] < tiles) & (rows[None, :] < T)
        at = (start + each.to(tl.int64))[:, None] * T + rows[None, :]
        largest = value_of(tl.load(ranks + at, inside, other=0))
        part = tl.load(totals + at, inside, other=0.0) * tl.exp(shift_of(largest) - shift[None, :])
        # A tile of minus infinities adds nothing, though its shift is 0 and exp may overflow.
        counts = inside & (largest != float("-inf"))
        total += tl.sum(tl.where(counts, part, 0.0), 0)

    inside_rows = rows < T
    own = tl.load(own_logits + rows, inside_rows, other=0.0)
    wanted = tl.load(reference + rows, inside_rows, other=0)
    tl.store(mismatch + rows, (greedy != wanted).to(tl.uint8), inside_rows)
    tl.store(nll + rows, (shift + tl.log(total)) - own, inside_rows)


def mismatch_and_nll(
    hidden: torch.Tensor,
    lm_head: torch.Tensor,
    reference: torch.Tensor,
    *,
    config: triton.Config | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """hidden [T, D], lm_head [V, D], reference [T] int64 in [0, V) -> mismatch [T] bool, nll [T] float32."""
    hidden, lm_head = native.as_rows(hidden), native.as_rows(lm_head)
    reference = reference.contiguous()
    (rows, depth), vocabulary = hidden.shape, lm_head.shape[0]
    mismatch = torch.empty((rows,), dtype=torch.bool, device=hidden.device)
    nll = torch.empty((rows,), dtype=torch.float32, device=hidden.device)
    if rows == 0:
        return mismatch, nll
    tiles = triton.cdiv(vocabulary, BLOCK_V)
    ranks, tokens = torch.empty((2, tiles, rows), dtype=torch.int32, device=hidden.device)
    totals = torch.empty((tiles, rows), dtype=torch.float32, device=hidden.device)
    own_logits = torch.empty((rows,), dtype=torch.float32, device=hidden.device)

    def launch(chosen: triton.Config) -> None:
        summarize_kernel[(triton.cdiv(rows, chosen.kwargs["BLOCK_T"]) * tiles,)](
            hidden,
            hidden.stride(0),
            lm_head,
            lm_head.stride(0),
            reference,
            ranks,
            tokens,
            totals,
            own_logits,
            rows,
            vocabulary,
            depth,
            BLOCK_V=BLOCK_V,
            **chosen.all_kwargs(),
        )

    with current_device_of(hidden):
        key = (hidden.device, hidden.dtype, bucket(rows), vocabulary, depth)
        configs = fits(CONFIGS[hidden.dtype], rows, "BLOCK_T")
        _TUNER.run(configs if config is None else [config], key, launch)
        merge_kernel[(triton.cdiv(rows, MERGE_CONFIG.kwargs["BLOCK_T"]),)](
            ranks,
            tokens,
            totals,
            own_logits,
            reference,
            mismatch.view(torch.uint8),
            nll,
            rows,
            tiles,
            **MERGE_CONFIG.all_kwargs(),
        )
    return mismatch, nll
