"""A certificate on a real model: the answers of the full head at every position."""

import pytest
import torch

import dtm_fast as dtm
from dtm_fast import ops
from dtm_fast.compression import Change
from dtm_fast.model import Decoder
from dtm_fast.ops import native

pytestmark = pytest.mark.model

COMPONENTS = (
    "model.layers.0.self_attn.o_proj",
    "model.layers.5.mlp.up_proj",
    "model.layers.11.self_attn.q_proj",
    "model.layers.22.mlp.down_proj",
    "model.layers.29.mlp.gate_proj",
)


@torch.no_grad()
def test_on_smollm2_it_answers_as_the_full_head(smollm2) -> None:
    reason = native.why_no_cpu_kernels()
    if reason is not None:
        pytest.skip(reason)
    model, tokenizer = smollm2
    text = "The river was low that summer, and the boats lay on the mud below the old mill. " * 20
    probes = dtm.Probes.from_text(model, tokenizer, text, prefix=24, completion=40, count=6, cache=False)
    reference = probes.tokens[:, probes.prefix :].contiguous()

    def last_hidden() -> torch.Tensor:
        output = model.model(input_ids=probes.tokens, use_cache=False)
        return output.last_hidden_state[:, probes.prefix - 1 : -1]

    base, decoder = last_hidden(), Decoder.of(model)
    hidden = {("", "base"): base}
    for path in COMPONENTS:
        for treatment in (dtm.Int8(), dtm.Prune(0.5)):
            with Change(decoder, {path: treatment}):
                hidden[path, treatment.key] = last_hidden()
    for dtype in (torch.float32, torch.bfloat16):
        lm_head = model.lm_head.weight.detach().to(dtype)
        certificate = ops.Certificate.build(base.to(dtype), lm_head)
        for (path, treatment), states in hidden.items():
            full = ops.token_divergence(states.to(dtype), lm_head, reference)
            result = ops.token_divergence(states.to(dtype), lm_head, reference, certificate=certificate)
            shares = {stage: f"{count / reference.numel():.1%}" for stage, count in result.settled.items()}
            print(f"{dtype} {path} {treatment}: {int(full.count.sum())} divergent tokens, settled {shares}")
            assert torch.equal(result.mismatch, full.mismatch)
            assert torch.equal(result.first, full.first)
            assert torch.equal(result.count, full.count)
            if treatment in ("base", "int8"):
                assert result.settled["int8 screen"] + result.settled["full head"] <= 0.01 * reference.numel()
