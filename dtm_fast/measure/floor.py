"""The self-divergence floor: how far rounding alone makes the base diverge from its own text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dtm_fast.measure.forward import choice, first_divergent, lead, logits_before
from dtm_fast.measure.probes import Probes

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Floor:
    """The base against its own completion, under another batch shape.

    Attributes:
        divergent: positions where it chose another token at either batch size.
        positions: positions compared, P * N.
        margin: the largest change of a decision's margin between the two batch sizes, in logits; a divergence
            by no more than this may be rounding.
        batch_size: rows a pass in all measurements.
        other_batch_size: rows a pass of the comparison.
        corrected: completion tokens where decoding with a cache fell otherwise than the full pass.
        fdt: the base's mean FDT, at that of the two batch sizes where it is lower: what a treatment measures that does
            nothing but round otherwise. None in runs of before it was kept.
    """

    divergent: int
    positions: int
    margin: float
    batch_size: int
    other_batch_size: int
    corrected: int
    fdt: float | None = None


def self_divergence(base: PreTrainedModel, probes: Probes) -> Floor:
    """Reads the probes at the usual batch size, and one row at a time (each row twice where that is usual)."""
    n = probes.prefix
    usual = min(probes.batch_size, len(probes))
    chosen, leads = _decisions(base, probes.tokens, n, usual)
    if usual > 1:
        other, (other_chosen, other_leads) = 1, _decisions(base, probes.tokens, n, 1)
    else:
        twice = probes.tokens.repeat_interleave(2, dim=0)
        other, (other_chosen, other_leads) = 2, (part[::2] for part in _decisions(base, twice, n, 2))
    written = probes.tokens[:, n:]
    mismatches = chosen != written, other_chosen != written
    return Floor(
        divergent=int((mismatches[0] | mismatches[1]).sum()),
        positions=chosen.numel(),
        margin=float((leads - other_leads).abs().max()),
        batch_size=usual,
        other_batch_size=other,
        corrected=probes.corrected,
        fdt=min(_mean_fdt(each) for each in mismatches),
    )


def _mean_fdt(mismatch: Tensor) -> float:
    """Of bool [P, N]."""
    return float(first_divergent(mismatch).double().mean())


def _decisions(base: PreTrainedModel, tokens: Tensor, n: int, batch_size: int) -> tuple[Tensor, Tensor]:
    """The base's choices int64 [P, N] and the leads of the written tokens float32 [P, N]."""
    chosen, leads = [], []
    for batch in tokens.split(batch_size):
        logits = logits_before(base, batch, n)
        chosen.append(choice(logits).cpu())
        leads.append(lead(logits, batch[:, n:].to(logits.device)).cpu())
    return torch.cat(chosen), torch.cat(leads)
