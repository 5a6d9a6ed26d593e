"""Symmetric int8 quantization of rows."""

import torch

from dtm_fast.ops import backends, checks, native
from dtm_fast.ops.library import is_recorded, register


def quantize_int8(weight: torch.Tensor, *, backend: str | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize every row to int8 with one scale: symmetric, ±127, round half to even.

    Equals, with `w = weight.float()`, `scale = w.abs().amax(-1) / 127` and
    `qweight = torch.round(w / scale[..., None]).clamp(-127, 127).to(torch.int8)`,
    where a row whose scale is 0 (all zeros, or so small that absmax / 127 underflows) becomes zeros.
    All backends return the same bits. The result carries no gradient.

    Args:
        weight: [N, K] or [..., K], float32, bfloat16 or float16.
        backend: None (the best), "cpu", "cuda", "triton" or "reference".

    Returns:
        qweight: int8 in [-127, 127], of weight's shape.
        scale: [N] or [...] float32; weight ≈ qweight * scale[..., None].

    Raises:
        TypeError: weight is no dense tensor of such a dtype.
        ValueError: weight holds a NaN or an infinity, or has no dimension; backend is unknown.
        RuntimeError: backend cannot run.

    Source: Wu et al. 2020, "Integer Quantization for Deep Learning Inference", section 3.
    """
    if is_recorded(weight):
        qweight, scale = _OPERATOR(weight.detach() if isinstance(weight, torch.Tensor) else weight, backend)
        return qweight, scale
    return _run(weight, backend)


def quantize_rows(x: torch.Tensor, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    """As quantize_int8, on a backend that can run; a row with a NaN or an infinity: zeros, scale NaN."""
    return _RUN[backend](x)


def quantize_rows_reference(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference twin of quantize_rows."""
    x = x.float()
    absmax = x.abs().amax(-1) if x.shape[-1] else x.new_zeros(x.shape[:-1])
    absmax = torch.where(absmax.isfinite(), absmax, torch.nan)
    # A tensor as divisor: on CUDA torch multiplies by the reciprocal of a number, which rounds differently.
    scale = absmax / torch.full_like(absmax, 127.0)
    usable = (scale > 0)[..., None]
    q = torch.where(usable, torch.round(x / scale[..., None]), 0.0)
    return q.clamp(-127, 127).to(torch.int8), scale


def _quantize_rows_cpu(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    cpu, isa, threads = native.cpu_call()
    rows = native.as_rows(x.float() if x.dtype == torch.float16 else x)
    q = x.new_empty(x.shape, dtype=torch.int8)
    scale = x.new_empty(x.shape[:-1], dtype=torch.float32)
    cpu.quantize_int8(
        isa,
        threads,
        rows.data_ptr(),
        native.FLOAT_TYPES[rows.dtype],
        rows.stride(0),
        *rows.shape,
        q.data_ptr(),
        scale.data_ptr(),
    )
    return q, scale


def _quantize_rows_cuda(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    cuda, stream = native.cuda_call(x.device)
    rows = native.as_separate_rows(x.float() if x.dtype == torch.float16 else x)
    q = x.new_empty(x.shape, dtype=torch.int8)
    scale = x.new_empty(x.shape[:-1], dtype=torch.float32)
    with native.on_device(x.device):
        cuda.quantize_int8(
            native.FLOAT_TYPES[rows.dtype],
            rows.data_ptr(),
            rows.stride(0),
            *rows.shape,
            q.data_ptr(),
            rows.shape[1],
            scale.data_ptr(),
            stream,
        )
    return q, scale


def _quantize_rows_triton(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    from dtm_fast.triton_kernels.quantize_int8 import quantize_rows as run

    return run(x)


_RUN = {
    "cpu": _quantize_rows_cpu,
    "cuda": _quantize_rows_cuda,
    "triton": _quantize_rows_triton,
    "reference": quantize_rows_reference,
}


def _check(weight: torch.Tensor) -> None:
    checks.tensor("weight", weight, (torch.float32, torch.bfloat16, torch.float16))
    checks.at_least_one_dim("weight", weight)


def _run(weight: torch.Tensor, backend: str | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    _check(weight)
    weight = weight.detach()
    chosen = backends.choose("quantize_int8", backend, weight.device, weight.dtype, checks.rows(weight))
    qweight, scale = quantize_rows(weight, chosen)
    # A row that is not finite is marked by its scale, which is far cheaper than to look at the weight first.
    if not checks.capturing(scale) and not bool(scale.isfinite().all()):
        checks.finite("weight", weight)
    return qweight, scale


def _fake(weight: torch.Tensor, backend: str | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    _check(weight)
    qweight = weight.new_empty(weight.shape, dtype=torch.int8)
    return qweight, weight.new_empty(weight.shape[:-1], dtype=torch.float32)


_OPERATOR = register("quantize_int8(Tensor weight, str? backend=None) -> (Tensor, Tensor)", _run, _fake)
