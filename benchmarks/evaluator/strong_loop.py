"""The best loop that one would write with transformers alone: no logits are kept, and nothing is run needlessly."""

import time

import torch

from dtm_fast.compression import Change, Configuration
from dtm_fast.measure import Probes
from dtm_fast.model import Decoder


@torch.no_grad()
def strong_loop(
    decoder: Decoder, probes: Probes, configuration: Configuration, rows: int = 1
) -> tuple[torch.Tensor, float]:
    """FDT of each probe, and the seconds it took.

    The components swapped, the body over all positions in one batch, the head on the completions of so many ``rows`` at
    a time, argmax, compare.
    """
    started = time.perf_counter()
    model, n = decoder.model, probes.prefix
    tokens = probes.tokens.to(model.device)
    mismatch = []
    with Change(decoder, configuration):
        hidden = model.base_model(tokens, use_cache=False).last_hidden_state[:, n - 1 : -1]
        for some, written in zip(hidden.split(rows), tokens[:, n:].split(rows), strict=True):
            mismatch.append(model.get_output_embeddings()(some).argmax(-1) != written)
    diverges = torch.cat(mismatch)
    fdt = torch.where(diverges.any(1), diverges.int().argmax(1), probes.completion).cpu()
    return fdt, time.perf_counter() - started
