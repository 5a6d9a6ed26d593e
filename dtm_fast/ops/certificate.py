"""What is kept of a base model's last hidden states to prove, without the head, that a token still wins.

The proof. A base hidden state h has logits z_v = w_v · h and the top token a. For h' = h + Δ

    z'_a - z'_v = (z_a - z_v) + (w_a - w_v) · Δ >= (z_a - z_v) - ‖w_a - w_v‖ ‖Δ‖        (Cauchy–Schwarz)

so token v cannot win while ‖Δ‖ is below its radius (z_a - z_v) / ‖w_a - w_v‖. That is the whole idea; what
follows leaves room for rounding, so that the proof is about the logits that `token_divergence` and `masked_linear`
compute.

The slack, step by step. u = 2^-24, γ = n u / (1 - n u), and n = D + ⌊D/256⌋ + 8, or 64, is at least the number of
roundings that any one product meets, in whatever order D products (and blocks of them) are summed, with or
without fused multiply-adds, or in pieces (float32 on AMX, where what is left out counts as 9 roundings). Then
every computed dot product has |fl(x · y) - x · y| <= γ ‖x‖ ‖y‖ + ε, where ε = n 2^-126 covers what underflows,
flushed to zero or not (Higham, "Accuracy and Stability of Numerical Algorithms",
section 3.1). AVX512-BF16 and AMX also take denormal elements and pieces as zero, which costs up to 2^-125
√D (‖x‖ + ‖y‖) more: the norms are computed 2^-100 (D + 1) too large, and γ >= 2^-21 times that much is above it.
With s = ‖w_a‖ + ‖w_v‖ and a hat on what was computed:

1. The base's own logits:         z_a - z_v        >= ẑ_a - ẑ_v - γ ‖h‖ s - 2ε.
2. The new logits of the full op: ẑ'_a - ẑ'_v      >= z'_a - z'_v - γ ‖h'‖ s - 2ε, and ‖h'‖ <= ‖h‖ + ‖Δ‖.
   1, 2 and Cauchy–Schwarz:       ẑ'_a - ẑ'_v      >= (ẑ_a - ẑ_v - 2γ ‖h‖ s - 4ε) - ‖Δ‖ (‖w_a - w_v‖ + γ s).
3. In float32, a wins against v if this is > 0. In bfloat16 both are then rounded, which keeps their order, so
   that they can at most become equal: harmless if a < v, since ties go to the lowest id. If v < a they must
   stay apart. Numbers that round to the same y differ by at most 2 · 2^-8 |y| <= τ |ẑ'_a| + 2^-133, where
   τ = 2^-7 (1 + 2^-6), and |ẑ'_a| <= |ẑ_a| + 2γ ‖h‖ ‖w_a‖ + (1 + γ) ‖w_a‖ ‖Δ‖ + 2ε by the same steps. The
   last term is again linear in ‖Δ‖, so that with t = τ if the dtype is bfloat16 and v < a, and else 0

       r_v = (ẑ_a - ẑ_v - 2γ ‖h‖ s - t (|ẑ_a| + 2γ ‖h‖ ‖w_a‖) - 8ε) / (‖w_a - w_v‖ + γ s + t (1 + γ) ‖w_a‖)

   is a radius below which v cannot win against a in the computed, rounded logits.
4. ‖w_a - w_v‖² is computed as ‖w_a‖² + ‖w_v‖² - 2 w_a · w_v, off by less than 2γ s² + 4ε, which is added.
5. r_v itself takes some ten float32 operations: γ and the norms are enlarged by 2^-16, r_v is reduced by as
   much, and so is the freedom from overflow bought: r_v is at most what keeps ‖h'‖ max ‖w‖ <= 2^120.

All comparisons are written so that a NaN proves nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from dtm_fast.ops import checks
from dtm_fast.ops.autocast import without_autocast
from dtm_fast.ops.rounding import (
    ENLARGED,
    LARGEST_LOGIT,
    REDUCED,
    norm_above,
    norms_above,
    summation_error,
    tie_width,
    underflow_error,
)
from dtm_fast.ops.vocabulary_screen import VocabularyScreen

_TILE = 1024  # tokens looked at at a time
_LOGITS = 2**24  # logits held at a time, of all tokens
_ROWS = 256  # positions at a time at most


@dataclass(frozen=True, eq=False)
class Certificate:
    """The base's hidden states, and for each the tokens that are the nearest to overtaking its top token.

    Hand it to `token_divergence(hidden, lm_head, reference, certificate=...)`, with the lm_head that it was
    built for, unchanged since, and hidden states of the same shape. P = B * T below.
    """

    hidden: torch.Tensor
    """[B, T, D], a copy of the base's hidden states."""
    lm_head: torch.Tensor
    """[V, D], the caller's, not a copy."""
    k: tuple[int, ...]
    """The numbers of nearest tokens that are tried, ascending."""
    top: torch.Tensor
    """int64 [P]: the token a that wins."""
    nearest: torch.Tensor
    """int64 [P, K]: the tokens of the smallest radii, the smallest first; K = min(max(k), V - 1)."""
    radius: torch.Tensor
    """float32 [P, K + 1]: their radii, and that of the next token, +inf if there is none."""
    version: int | None
    """The count of in-place changes of lm_head when this was built; None where torch does not count."""

    @classmethod
    @without_autocast
    def build(
        cls, hidden: torch.Tensor, lm_head: torch.Tensor, *, k: int | Sequence[int] = (16, 128)
    ) -> "Certificate":
        """Prepares proofs for hidden states near these.

        Takes the time of about four full reductions, 12 bytes per position and kept token, and for the moment some
        200 MiB: logits and radii of up to 256 positions at a time.

        Args:
            hidden: [B, T, D], float32 or bfloat16: what the base's final norm gives.
            lm_head: [V, D], V >= 1, in the dtype of hidden.
            k: how many of the most threatening tokens to recompute, one number or several to try one after
                the other. What max(k) cannot prove is screened in int8.

        Raises:
            TypeError: an argument is no dense tensor of such a dtype, or k holds no whole numbers.
            ValueError: shapes or devices do not fit, or k is empty or not positive.

        Source: the radius is that of certified robustness by Lipschitz margins, Tsuzuku et al. 2018
        ("Lipschitz-Margin Training"), with the norm of each difference of two weight rows.
        """
        checks.tensor("hidden", hidden, (torch.float32, torch.bfloat16))
        checks.dims("hidden", hidden, "[B, T, D]", 3)
        checks.tensor("lm_head", lm_head, (hidden.dtype,))
        checks.dims("lm_head", lm_head, "[V, D]", 2)
        checks.size("lm_head", lm_head, 1, hidden.shape[2], "D of hidden")
        checks.same_device("hidden", hidden, lm_head=lm_head)
        if lm_head.shape[0] == 0:
            raise ValueError("lm_head: expected at least one token (V >= 1), got shape [0, D]")
        stages = _stages(k)
        hidden, lm_head = hidden.detach().contiguous().clone(), lm_head.detach()
        rows = hidden.flatten(0, 1)
        kept = min(stages[-1], lm_head.shape[0] - 1)
        norm = norms_above(lm_head)
        squares = torch.cat([part.double().square().sum(1) for part in lm_head.split(_TILE)]).to(
            product_dtype()
        )
        count = max(1, min(_ROWS, _LOGITS // len(lm_head)))
        found = [_nearest(part, lm_head, norm, squares, kept) for part in rows.split(count)]
        top, nearest, radius = (torch.cat(parts) for parts in zip(*found, strict=True))
        return cls(hidden, lm_head, stages, top, nearest, radius, _version(lm_head))

    @cached_property
    def screen(self) -> VocabularyScreen | None:
        """The int8 copy of lm_head for what the nearest tokens cannot prove; made when first needed.

        None where there can be none, because lm_head is not finite or D is too large for int8_linear.
        """
        return VocabularyScreen.build(self.lm_head)

    def check(self, hidden: torch.Tensor, lm_head: torch.Tensor) -> None:
        """Raise ValueError unless this was built for this lm_head and for hidden states of this shape."""
        if hidden.shape != self.hidden.shape or hidden.dtype != self.hidden.dtype:
            raise ValueError(
                f"certificate: built for hidden {list(self.hidden.shape)} of {self.hidden.dtype}, "
                f"got {list(hidden.shape)} of {hidden.dtype}"
            )
        checks.same_device("hidden", hidden, certificate=self.hidden)
        same = lm_head.data_ptr() == self.lm_head.data_ptr() and lm_head.stride() == self.lm_head.stride()
        if not same or lm_head.shape != self.lm_head.shape:
            raise ValueError("certificate: built for another lm_head than the one given")
        if self.version is not None and _version(self.lm_head) != self.version:
            raise ValueError("certificate: lm_head was changed in place since the certificate was built")


def _stages(k: int | Sequence[int]) -> tuple[int, ...]:
    given = tuple(k) if isinstance(k, Sequence) else (k,)
    if not all(isinstance(each, int) and not isinstance(each, bool) for each in given):
        raise TypeError(f"k: expected a whole number or several, got {k!r}")
    if not given or min(given) < 1:
        raise ValueError(f"k: expected at least one number, each at least 1, got {k!r}")
    return tuple(sorted(set(given)))


def _version(lm_head: torch.Tensor) -> int | None:
    return None if lm_head.is_inference() else lm_head._version


def product_dtype() -> torch.dtype:
    """The dtype in which torch multiplies matrices with float32's error or less.

    It may be set to compute float32 products in bfloat16 or TF32, of which the bounds know nothing.
    """
    try:
        full = torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # the settings of several backends contradict each other
        return torch.float64
    mkldnn = getattr(getattr(torch.backends.mkldnn, "matmul", None), "fp32_precision", "none")
    return torch.float32 if full and mkldnn in ("none", "ieee") else torch.float64


def _nearest(
    hidden: torch.Tensor, lm_head: torch.Tensor, norm: torch.Tensor, squares: torch.Tensor, kept: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """top [P], nearest [P, kept] and radius [P, kept + 1] of hidden [P, D].

    norm [V] is above ‖w_v‖, squares [V] are ‖w_v‖² in product_dtype().
    """
    dtype, depth = product_dtype(), hidden.shape[1]
    gamma, epsilon, tau = summation_error(depth), underflow_error(depth), tie_width(hidden.dtype)
    x = hidden.to(dtype)
    logits = [x @ w.to(dtype).T for w in lm_head.split(_TILE)]
    highest, ids = (torch.stack(parts) for parts in zip(*(tile.max(1) for tile in logits), strict=True))
    z_top, tile_of_top = highest.max(0)
    top = ids.gather(0, tile_of_top[None])[0] + tile_of_top * _TILE
    # Positions share their top tokens, so that the distances between tokens are fewer than positions.
    tops, of_position = top.unique(return_inverse=True)
    w_top = lm_head[tops].to(dtype)
    norm_hidden, norm_top = norm_above(hidden)[:, None], norm[top][:, None]
    base_error = 2 * gamma * norm_hidden
    z_top = z_top[:, None]
    tie = tau * (z_top.float().abs() + base_error * norm_top)
    radii = []
    # Step 3, in place: what is computed with a tile of tokens stays in the second-level cache.
    for start in range(0, len(lm_head), _TILE):
        tile = slice(start, start + _TILE)
        reach = _difference_norm(
            w_top, lm_head[tile].to(dtype), squares[tops], squares[tile], norm[tops], norm[tile]
        )
        reach = reach[of_position]
        norms = norm_top + norm[tile]
        radius = (z_top - logits.pop(0)).float().addcmul_(base_error, norms, value=-1)
        reach.add_(norms, alpha=gamma)
        if tau:
            lower = (torch.arange(start, start + norms.shape[1], device=top.device) < top[:, None]).float()
            radius.addcmul_(lower, tie, value=-1)
            reach.addcmul_(lower, tau * (1 + gamma) * norm_top)
        radius.sub_(8 * epsilon).div_(reach).mul_(REDUCED)
        radii.append(radius.nan_to_num_(-torch.inf, torch.inf, -torch.inf))
    radius = torch.cat(radii, 1).scatter_(1, top[:, None], torch.inf)
    radius, nearest = radius.topk(min(kept + 1, len(lm_head)), 1, largest=False)
    # Beyond this ‖Δ‖ a logit might overflow. The top token itself has come in as the last one, with +inf.
    limit = (LARGEST_LOGIT / norm.max() - norm_hidden).nan_to_num(-torch.inf)
    return top, nearest[:, :kept].contiguous(), torch.minimum(radius, limit * REDUCED)


def _difference_norm(
    w_top: torch.Tensor,
    w: torch.Tensor,
    squares_top: torch.Tensor,
    squares: torch.Tensor,
    norm_top: torch.Tensor,
    norm: torch.Tensor,
) -> torch.Tensor:
    """Step 4: an upper bound of ‖w_a - w_v‖, float32 [tops, tile]."""
    depth = w.shape[1]
    computed = (w_top @ w.T).mul_(-2).add_(squares_top[:, None]).add_(squares).float().clamp_(min=0)
    norms = norm_top[:, None] + norm
    computed.addcmul_(norms, norms, value=2 * summation_error(depth)).add_(4 * underflow_error(depth))
    return computed.sqrt_().mul_(ENLARGED)
