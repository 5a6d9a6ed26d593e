"""What a user would call instead of dtm_fast: each as a function that prepares it and returns the call."""

import importlib.util
import math
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F

Call = Callable[[], torch.Tensor]


def dense(x: torch.Tensor, weight: torch.Tensor) -> Call:
    """F.linear (MKL in float32, oneDNN in bfloat16)."""
    return lambda: F.linear(x, weight)


def onednn(x: torch.Tensor, weight: torch.Tensor) -> Call:
    """oneDNN on weights in its own blocked layout, as torch.compile's freezing calls it."""
    reordered = torch.ops.mkldnn._reorder_linear_weight(weight, math.prod(x.shape[:-1]))
    return lambda: torch.ops.mkldnn._linear_pointwise(x, reordered, None, "none", [], "")


def onednn_tensors(x: torch.Tensor, weight: torch.Tensor) -> Call:
    """aten::mkldnn_linear on mkldnn tensors, x already one, the result left as one."""
    opaque_x, opaque_weight = x.to_mkldnn(), weight.to_mkldnn()
    return lambda: torch.ops.aten.mkldnn_linear(opaque_x, opaque_weight, None)


def fbgemm(x: torch.Tensor, qweight: torch.Tensor, scale: torch.Tensor) -> Call:
    """quantized::linear_dynamic, engine fbgemm, qint8 per channel; it takes float32 only, hence casts for others."""
    torch.backends.quantized.engine = "fbgemm"
    zero_points = torch.zeros(len(scale), dtype=torch.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch 2.13 announces the end of its quantized dtypes
        weight = torch._make_per_channel_quantized_tensor(qweight, scale.double(), zero_points, 0)
    packed = torch.ops.quantized.linear_prepack(weight, None)
    if x.dtype == torch.float32:
        return lambda: torch.ops.quantized.linear_dynamic(x, packed)
    return lambda: torch.ops.quantized.linear_dynamic(x.float(), packed).to(x.dtype)


def w8a8(x: torch.Tensor, qweight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The W8A8 layer as one writes it in torch: quantize per token, torch._int_mm, scale."""
    scale_x = x.float().abs().amax(-1, keepdim=True) / 127
    qx = torch.round(x.float() / scale_x).clamp(-127, 127).to(torch.int8)
    return (torch._int_mm(qx, qweight.T).float() * (scale_x * scale)).to(x.dtype)


def eager_w8a8(x: torch.Tensor, qweight: torch.Tensor, scale: torch.Tensor) -> Call:
    return lambda: w8a8(x, qweight, scale)


def compiled_w8a8() -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Call]:
    """torch.compile of the same, for one shape: what the first call compiles, all copies share."""
    torch._dynamo.reset()
    compiled = torch.compile(w8a8, dynamic=False)

    def prepare(x: torch.Tensor, qweight: torch.Tensor, scale: torch.Tensor) -> Call:
        return lambda: compiled(x, qweight, scale)

    return prepare


def why_no_torchao() -> str | None:
    """Why there is no torchao contender: it is timed only where someone has installed it."""
    if importlib.util.find_spec("torchao") is None:
        return "torchao is not installed"
    return None


def torchao_w8a8(x: torch.Tensor, weight: torch.Tensor) -> Call:
    """torchao Int8DynamicActivationInt8WeightConfig, eager."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    layer.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
    quantize_(layer, Int8DynamicActivationInt8WeightConfig())
    return lambda: layer(x)
