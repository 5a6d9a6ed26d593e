"""FDT and SDT as anyone would compute them with Hugging Face alone: nothing of dtm_fast is used here."""

import torch
from transformers.pytorch_utils import Conv1D


def int8(w):
    scale = w.abs().amax(dim=1, keepdim=True) / 127
    return torch.where(scale > 0, torch.round(w / scale), 0.0) * scale


def prune(w, sparsity):
    order = w.abs().flatten().sort(stable=True).indices
    pruned = w.flatten().clone()
    pruned[order[: round(sparsity * w.numel())]] = 0
    return pruned.view_as(w)


@torch.no_grad()
def fdt_and_sdt(model, tokens, n, changes):
    """``changes``: module path → a function of the weight [N, K]; tokens int64 [probes, n + N]."""
    originals = {path: model.get_submodule(path).weight.data.clone() for path in changes}
    for path, change in changes.items():
        module = model.get_submodule(path)
        weight = originals[path].T if isinstance(module, Conv1D) else originals[path]
        changed = change(weight.contiguous())
        module.weight.data.copy_(changed.T if isinstance(module, Conv1D) else changed)
    chosen = model(tokens).logits.argmax(-1)[:, n - 1 : -1]
    for path, original in originals.items():
        model.get_submodule(path).weight.data.copy_(original)
    fdt, sdt = [], []
    for row, written in zip(chosen.tolist(), tokens[:, n:].tolist(), strict=True):
        differs = [a != b for a, b in zip(row, written, strict=True)]
        fdt.append(differs.index(True) if True in differs else len(differs))
        sdt.append(sum(differs))
    return fdt, sdt
