"""A look at the whole vocabulary in int8, which finds the tokens that may win and proves that no other can.

With the int8 values q, their scales s and what quantization lost e, of a hidden state and of a token's weights

    h = ĥ + e_h,  w_v = ŵ_v + e_v      z_v = h · w_v = ĥ · ŵ_v + e_h · w_v + ĥ · e_v
    |z_v - ĥ · ŵ_v| <= ‖e_h‖ ‖w_v‖ + ‖ĥ‖ ‖e_v‖                                        (Cauchy–Schwarz)

`int8_linear` sums q_h · q_v exactly in int32, and its conversion to float32 and two products are off by 4u |ĥ · ŵ_v|
and, where the product of the scales underflows, by 2^31 2^-126. Adding the bound in float32 costs twice as much
again, so 16u ‖ĥ‖ (‖w_v‖ + ‖e_v‖) + 2^-94 covers both; γ ‖h‖ ‖w_v‖ + ε is what the full op is off by, in its own
order of summation. So no logit that the full op computes, before it is rounded to bfloat16, is above

    int8_linear(h)_v + (‖e_h‖ + γ ‖h‖ + 16u ‖ĥ‖) ‖w_v‖ + (1 + 16u) ‖ĥ‖ ‖e_v‖ + ε + 2^-94.

Names and the numbers u, γ, ε are those of certificate.py.
"""

from dataclasses import dataclass

import torch

from dtm_fast.ops.int8_linear import MAX_K, int8_linear
from dtm_fast.ops.quantize_int8 import quantize_int8
from dtm_fast.ops.rounding import (
    ENLARGED,
    LARGEST_LOGIT,
    norm_above,
    norms_above,
    summation_error,
    tie_width,
    underflow_error,
)

_TILE = 4096  # tokens looked at at a time, or of few positions as many as make
_LOGITS = 2**20  # so many logits
_CONVERSION = 16 * 2.0**-24


@dataclass(frozen=True, eq=False)
class VocabularyScreen:
    """lm_head [V, D] in int8, with the norms that the bound needs."""

    qweight: torch.Tensor
    """int8 [V, D]."""
    scale: torch.Tensor
    """float32 [V]."""
    norm: torch.Tensor
    """float32 [V], above ‖w_v‖."""
    lost: torch.Tensor
    """float32 [V], above ‖e_v‖."""

    @classmethod
    def build(cls, lm_head: torch.Tensor) -> "VocabularyScreen | None":
        """Quantizes lm_head [V, D]; None if it is not finite or D is beyond int8_linear's MAX_K."""
        norm = norms_above(lm_head)
        if lm_head.shape[1] > MAX_K or not bool(norm.isfinite().all()):
            return None
        qweight, scale = quantize_int8(lm_head)
        parts = zip(*(each.split(_TILE) for each in (lm_head, qweight, scale)), strict=True)
        lost = torch.cat([norm_above(w.double() - q.double() * s.double()[:, None]) for w, q, s in parts])
        return cls(qweight, scale, norm, lost)

    def covers(self, hidden: torch.Tensor) -> torch.Tensor:
        """Which rows of hidden [R, D] are finite and cannot make a logit overflow; bool [R]."""
        return norm_above(hidden) * self.norm.max() <= LARGEST_LOGIT

    def rivals(
        self,
        hidden: torch.Tensor,
        lm_head: torch.Tensor,
        token: torch.Tensor,
        reach: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Which tokens may win against `token` in the logits that the full op computes.

        Args:
            hidden: [R, D], rows that this covers.
            lm_head: [V, D], what this was built of.
            token: int64 [R].
            reach: float32 [R], how far from each hidden state no excluded token may win either; 0 by default.

        Returns:
            bool [R, V]; where it is False the token cannot win, nor tie with a lower id.
        """
        depth = hidden.shape[1]
        gamma, epsilon = summation_error(depth), underflow_error(depth)
        qhidden, scale = quantize_int8(hidden)
        kept = qhidden.double() * scale.double()[:, None]
        norm, norm_kept = norm_above(hidden), norm_above(kept)
        per_norm = (norm_above(hidden.double() - kept) + gamma * norm + _CONVERSION * norm_kept) * ENLARGED
        per_lost = (1 + _CONVERSION) * ENLARGED * norm_kept
        # What a token must reach: the full op's own logit of `token` at least, and in bfloat16 what rounds to it.
        logit = (hidden.double() * lm_head[token].double()).sum(1)
        error = gamma * norm.double() * self.norm[token] + epsilon
        needed = logit - error - tie_width(hidden.dtype) * (logit.abs() + error) - 2 * epsilon - 2.0**-94
        if reach is not None:
            # Moving h by r moves z_v by at most r ‖w_v‖, and that of `token` by r times its norm.
            per_norm = (per_norm + reach) * ENLARGED
            needed -= ENLARGED * reach.double() * self.norm[token]
        floor = (needed - needed.abs() * 2.0**-20).float()[:, None]
        # int8_linear quantizes a float32 copy to the same values and does not round its result to bfloat16.
        hidden = hidden.float()
        found = torch.empty((len(hidden), len(lm_head)), dtype=torch.bool, device=hidden.device)
        tokens = max(_TILE, _LOGITS // max(1, len(hidden)))
        for start in range(0, len(lm_head), tokens):
            tile = slice(start, start + tokens)
            above = int8_linear(hidden, self.qweight[tile], self.scale[tile])
            above.addcmul_(per_norm[:, None], self.norm[tile])
            above.addcmul_(per_lost[:, None], self.lost[tile])
            torch.lt(above, floor, out=found[:, tile])
        return found.logical_not_()  # a NaN excludes nothing
