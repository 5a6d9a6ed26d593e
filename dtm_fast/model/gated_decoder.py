"""A Hugging Face decoder layer of Llama's kind, as the parts that the fused kernel computes with."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dtm_fast.model.stepping import LayerCall
from dtm_fast.ops.layer_weights import LayerShape

# What these layers compute is known: RMS norm, attention with grouped heads and rotary positions, RMS norm, gated
# MLP. That a layer really does is checked on the base's own states (measure/fused_layers.py).
_KNOWN = (
    "LlamaDecoderLayer",
    "MistralDecoderLayer",
    "Phi3DecoderLayer",
    "Qwen2DecoderLayer",
    "Qwen3DecoderLayer",
)
_ACTIVATIONS = ("SiLU", "SiLUActivation")


@dataclass(frozen=True, eq=False)
class LayerParts:
    """The modules of a layer by what they are for; names are paths inside the layer.

    Attributes:
        shape: sizes and numbers.
        attention_norm, mlp_norm: weights of the RMS norms [hidden].
        q_norm, k_norm: weights of the norms of heads [head_dim], or None.
        cosine, sine: [T, head_dim].
        attention_in, mlp_in: name and linear module, in the order of their columns.
        attention_out, mlp_out: likewise.
    """

    shape: LayerShape
    attention_norm: Tensor
    mlp_norm: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    cosine: Tensor
    sine: Tensor
    attention_in: tuple[tuple[str, nn.Linear], ...]
    attention_out: tuple[str, nn.Linear]
    mlp_in: tuple[tuple[str, nn.Linear], ...]
    mlp_out: tuple[str, nn.Linear]

    @property
    def projections(self) -> tuple[tuple[str, nn.Linear], ...]:
        """All, in the order in which they run."""
        return (*self.attention_in, self.attention_out, *self.mlp_in, self.mlp_out)


def parts_of(call: LayerCall, most_head_dim: int) -> LayerParts | str:
    """The parts of the layer that ``call`` calls, or in a few words why it is no such layer.

    Every position sees all before it: a layer with a sliding window that is shorter than the text is none.
    """
    layer: Any = call.layer
    kind = type(layer).__name__
    if kind not in _KNOWN:
        return f"{kind} is no layer that the fused kernel knows"
    attention, mlp = layer.self_attn, layer.mlp
    config = attention.config
    positions = call.kwargs.get("position_embeddings")
    if not isinstance(positions, tuple) or len(positions) != 2:
        return f"{kind} is not handed its rotary positions"
    cosine, sine = (each[0].float().contiguous() for each in positions)
    window = _window_of(attention)
    if window is not None and window < len(cosine):
        return f"{kind} has a sliding window of {window}, and the text has {len(cosine)} positions"
    if type(mlp.act_fn if hasattr(mlp, "act_fn") else mlp.activation_fn).__name__ not in _ACTIVATIONS:
        return f"{kind} has another activation than SiLU"
    if cosine.shape[-1] != attention.head_dim or attention.head_dim > most_head_dim:
        return f"{kind} rotates a part of its heads, or they are larger than {most_head_dim}"
    if config.intermediate_size % 32:
        return f"intermediate_size {config.intermediate_size} is no multiple of 32"
    shape = LayerShape(
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=attention.head_dim,
        intermediate=config.intermediate_size,
        eps=layer.input_layernorm.variance_epsilon,
        attention_scale=attention.scaling,
    )

    def named(*names: str) -> tuple[tuple[str, nn.Linear], ...]:
        return tuple((name, layer.get_submodule(name)) for name in names)

    fused_in = hasattr(attention, "qkv_proj")
    q_norm, k_norm = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
    parts = LayerParts(
        shape,
        _vector(layer.input_layernorm.weight),
        _vector(layer.post_attention_layernorm.weight),
        None if q_norm is None else _vector(q_norm.weight),
        None if k_norm is None else _vector(k_norm.weight),
        cosine,
        sine,
        named("self_attn.qkv_proj")
        if fused_in
        else named("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        named("self_attn.o_proj")[0],
        named("mlp.gate_up_proj") if hasattr(mlp, "gate_up_proj") else named("mlp.gate_proj", "mlp.up_proj"),
        named("mlp.down_proj")[0],
    )
    if any(type(module) is not nn.Linear for _, module in parts.projections):
        return f"{kind} has projections that are not plain Linear modules"
    return parts


def _window_of(attention: Any) -> int | None:
    """How many positions, itself among them, a position sees at most; None without a bound."""
    # Where layers differ (layer_types), each attention says it of itself; elsewhere the configuration does of all.
    own = attention if hasattr(attention, "sliding_window") else attention.config
    return getattr(own, "sliding_window", None)


def _vector(weight: Tensor) -> Tensor:
    return weight.detach().to("cpu", torch.float32).contiguous()
