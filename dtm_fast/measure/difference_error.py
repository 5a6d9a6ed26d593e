"""How far arithmetic by differences may misjudge a decision: measured on SmolLM2, and on the model at hand."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from dtm_fast.compression import Configuration, Prune
from dtm_fast.measure.part_layers import PartLayers
from dtm_fast.measure.prefix_tree import first_difference, layers_of
from dtm_fast.ops.layer_weights import Arithmetic

# By how much CHANGE may misjudge the distance of a hidden state to the border of a decision, in units of how far that
# state is from the base's. Measured on SmolLM2 (28 single components, 22,400 positions): after 1, 14 and 29 layers
# the median error is 0.6, 1.4 and 1.9e-4, the 99.9th percentile 5, 15 and 29e-4, the largest 5, 26 and 35e-4. What
# is allowed here is 1.5 to 2 times that percentile. An error that points anywhere has a share of 1 / sqrt(D) in the
# direction that counts: a smaller hidden size than SmolLM2's is allowed more. FINE_CHANGE, which rounds to 2^-17
# instead of 2^-9, errs by 0.4 and 3e-5 after 30 layers of a pruned component (the same percentiles); of smaller changes
# what float32 loses of the states is the larger part, as in the exact arithmetic.
_ERROR = 8e-4
_ERROR_OF_A_LAYER = 1.6e-4
_MEASURED_HIDDEN = 576
_FINENESS = 2**-7

LARGEST_CHANGE = 0.7
"""Of a weight, relative to it: up to this differences are what is small, and their error is as measured.

What remains of a state when most of what made it is taken away is small beside the rounded difference, and a norm makes
it large again, with its error: on SmolLM2 up to 7 times what is allowed where a component is dropped, 1.5 times where
95% of it are pruned, and on Qwen3, which has norms behind q and k, 70 times. Pruning 75% changes a weight by 0.6.
"""

# What the model at hand is tried with: the largest change that is computed by differences.
_TRIED = Prune(0.75)
_POSITIONS = 64  # of each completion
_RIVALS = 4  # tokens of the largest logits beside the base's
_PROBES = 2
_SAFETY = 1.25  # the largest of some thousand errors is not the largest of all
_TOO_FAR = 8.0


def error_of(arithmetic: Arithmetic, layers: int, hidden: int) -> float:
    """How far a distance to a decision may be off after so many layers of this hidden size, on a model like SmolLM2."""
    if not arithmetic.is_change:
        return 0.0
    error = (_ERROR + _ERROR_OF_A_LAYER * layers) * max(1.0, math.sqrt(_MEASURED_HIDDEN / hidden))
    return error * _FINENESS if arithmetic == Arithmetic.FINE_CHANGE else error


def changes_much(layers: PartLayers, by_layer: Mapping[int, Configuration]) -> bool:
    """Whether differences to the base are no small thing beside what these treatments leave."""
    return layers.largest_change(by_layer) > LARGEST_CHANGE


@torch.no_grad()
def error_scale(layers: PartLayers, head: Tensor, tokens: Tensor, prefix: int) -> float | None:
    """How many times ``error_of`` differences may err on this model, at least 1; None if they are of no use.

    Sharp attention and a few channels far above the others make the same rounding weigh more. Some components of the
    first layer and of one in the middle are pruned, each alone, and two probes are read both ways: the layers behind
    are the same for all of them.

    Args:
        layers: on the model's own states, by differences.
        head: [V, D], the weight of the head.
        tokens: int64 [P, T], of the probes.
        prefix: n of the probes.
    """
    decoder, errors = layers.decoder, [0.0]
    for layer in dict.fromkeys((0, layers.depth // 2)):
        own = [path for path, component in decoder.components.items() if component.layer == layer]
        for path in dict.fromkeys((own[0], own[len(own) // 2], own[-1])):
            by_layer = layers_of(decoder, {path: _TRIED})
            errors.append(_largest_error(layers, by_layer, head, tokens, prefix))
    scale = _SAFETY * float(torch.tensor(errors).max())
    return max(1.0, scale) if scale <= _TOO_FAR else None  # nor where it is no number


def _largest_error(
    layers: PartLayers, by_layer: Mapping[int, Configuration], head: Tensor, tokens: Tensor, prefix: int
) -> float:
    """The largest error of a distance to a decision, in units of what ``error_of`` allows."""
    start = first_difference(by_layer, {}, layers.depth)
    rows = list(range(min(_PROBES, layers.count)))
    first, end = prefix - 1, min(layers.positions, prefix - 1 + _POSITIONS)
    found = []
    for arithmetic in (layers.exact, layers.arithmetic):
        x: Tensor | None = None
        kv = layers.new_kv(len(rows))
        for layer in range(start, layers.depth):
            x = layers.run(layer, by_layer.get(layer, {}), x, arithmetic, rows, 0, end, kv=kv)
        state = None if x is None else x[:, first:]
        found.append(layers.head_input(state, arithmetic, rows, first, end).float())
    base = layers.head_input(None, layers.exact, rows, first, end).float()
    exact, changed = found
    reference = tokens[rows, prefix : end + 1].to(head.device)
    # By row, for the logits of a whole vocabulary are large.
    errors = [_distances(*each, head) for each in zip(exact, changed - exact, reference, strict=True)]
    allowed = error_of(layers.arithmetic, layers.depth - start, layers.shape.hidden)
    apart = (changed - base).norm(dim=-1).to(head.device)
    ratios = torch.stack(errors) / (allowed * apart)
    return float(ratios[apart > 0].max()) if bool((apart > 0).any()) else 0.0


def _distances(hidden: Tensor, error: Tensor, reference: Tensor, head: Tensor) -> Tensor:
    """How far ``error`` [N, D] moves ``hidden`` towards or from the nearest decisions, [N]."""
    logits = hidden.to(head.dtype) @ head.t()
    logits.scatter_(1, reference[:, None], -torch.inf)
    rivals = logits.topk(min(_RIVALS, logits.shape[1] - 1), dim=1).indices
    directions = (head[rivals] - head[reference][:, None]).float()
    along = torch.linalg.vecdot(directions, error[:, None].to(head.device))
    # Equal tokens are no distance apart, and nothing moves between them.
    lengths = directions.norm(dim=2).clamp_min(torch.finfo(torch.float32).tiny)
    furthest: Tensor = (along / lengths).abs().amax(dim=1)
    return furthest
