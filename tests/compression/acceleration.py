"""What the tests of accelerated models share."""

import pytest
import torch

import dtm_fast as dtm
from dtm_fast.compression import W8A8, Change, Int8, LLMInt8, Prune, Treatment, break_even
from dtm_fast.model import Decoder, model_identity

FAMILIES = ["llama", "gpt2", "phi3", "opt"]
UP = "model.layers.1.mlp.up_proj"
TOKENS = torch.arange(3, 19)[None]
# Two that leave no float product as it was, one without a kernel, one that is only stored otherwise.
MIXED = [W8A8(), Prune(0.5), LLMInt8(), Int8()]


def use(monkeypatch: pytest.MonkeyPatch, even: break_even.BreakEven) -> None:
    """Whatever was measured, and however small a weight is."""
    monkeypatch.setattr(break_even, "SMALLEST", dict.fromkeys(break_even.SMALLEST, 0))
    monkeypatch.setattr(break_even, "TABLE", dict.fromkeys(break_even.TABLE, even))


def everywhere(model: torch.nn.Module, *treatments: Treatment) -> dict[str, Treatment]:
    """Every component, the treatments in turn."""
    return {path: treatments[i % len(treatments)] for i, path in enumerate(dtm.components(model))}


@torch.no_grad()
def logits(model: torch.nn.Module, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    return model(input_ids=tokens, use_cache=False).logits


def treated_logits(model: torch.nn.Module, configuration: dict[str, Treatment]) -> torch.Tensor:
    with Change(Decoder.of(model), configuration):
        return logits(model)


def layers_of(model: torch.nn.Module, paths) -> list[torch.nn.Module]:
    return [model.get_submodule(path) for path in paths]


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def unchanged(model: torch.nn.Module):
    return model_identity(model), [id(each) for each in model.modules()], sorted(vars(model))


def with_hook(model) -> None:
    model.get_submodule(UP).register_forward_hook(lambda module, args, output: None)


@torch.no_grad()
def uncached(model, tokens: torch.Tensor, count: int) -> torch.Tensor:
    for _ in range(count):
        following = logits(model, tokens)[:, -1].argmax(-1, keepdim=True)
        tokens = torch.cat([tokens, following], dim=1)
    return tokens
