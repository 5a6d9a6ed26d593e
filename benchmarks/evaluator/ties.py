"""Whether another FDT than the loop's is a tie that rounding decides."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from dtm_fast.compression import Change, Configuration
from dtm_fast.measure import Evaluator
from dtm_fast.measure.forward import lead, logits_before
from dtm_fast.measure.reference import describe


class Difference(NamedTuple):
    """FDT of the same probes by two ways."""

    configuration: Configuration
    ours: torch.Tensor
    loops: torch.Tensor


@torch.no_grad()
def judged(evaluator: Evaluator, differences: Sequence[Difference]) -> tuple[int, list[str]]:
    """How many differences are decided by no more logits than the evaluator's floor; and the others in words."""
    ties, beyond = 0, []
    tokens, n = evaluator.probes.tokens, evaluator.probes.prefix
    for configuration, ours, loops in differences:
        rows = (ours != loops).nonzero()[:, 0].tolist()
        with Change(evaluator.decoder, configuration):
            logits = logits_before(evaluator.model, tokens[rows], n)
        leads = lead(logits, tokens[rows, n:].to(logits.device)).abs().cpu()
        for row, probe in enumerate(rows):
            apart = float(leads[row, min(int(ours[probe]), int(loops[probe]))])
            if apart <= evaluator.floor.margin:
                ties += 1
            else:
                beyond.append(
                    f"{describe(configuration)}, probe {probe}: FDT {int(ours[probe])}, the loop's "
                    f"{int(loops[probe])}, apart by {apart:.3g} logits"
                )
    return ties, beyond
