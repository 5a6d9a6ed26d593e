"""Linear layer with int8 weights and activations quantized on the fly."""

from typing import cast

import torch

from dtm_fast.ops import backends, checks, direct, native
from dtm_fast.ops.library import is_recorded, register
from dtm_fast.ops.quantize_int8 import quantize_rows_reference

# |q_x * q_w| <= 128 * 128 = 2^14, so a sum over fewer than 2^17 products stays below 2^31.
MAX_K = 2**17 - 1


def int8_linear(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """Multiply int8 weights by activations that are quantized per token, dynamically, as quantize_int8 does.

    Equals, with `qx, sx = quantize_int8(x)` and every step rounded to float32,
    `((qx.int() @ qweight.int().T).float() * (sx[..., None] * scale) + bias).to(x.dtype)`.
    All backends return the same bits. A token (row of x) that holds a NaN or an infinity gives a row of NaN.

    Args:
        x: [..., K], float32 or bfloat16.
        qweight: [N, K] int8; -128 is allowed. K <= 131071, so that int32 sums cannot overflow.
        scale: [N] float32, finite.
        bias: [N], in the dtype of x or float32, or None.
        backend: None (the best), "cpu", "cuda", "triton" or "reference".

    Returns:
        [..., N] in the dtype of x.

    Raises:
        TypeError: an argument is no dense tensor of such a dtype.
        ValueError: shapes or devices do not fit, K is too large, scale is not finite; backend is unknown.
        RuntimeError: backend cannot run; autograd would need a backward (rounding has none).

    Source: LLM.int8(), Dettmers et al. 2022 (vector-wise quantization).
    """
    if is_recorded(x, qweight, scale, bias):
        checks.no_gradient_needed("int8_linear", x, scale, bias)  # the operator has none
        return cast(torch.Tensor, _OPERATOR(x, qweight, scale, bias, backend))
    if backend is None and (y := direct.run("int8_linear", x, qweight, scale, bias)) is not None:
        return y
    return _run(x, qweight, scale, bias, backend)


def int8_linear_reference(
    x: torch.Tensor, qweight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """The reference twin."""
    qx, scale_x = quantize_rows_reference(x)
    # float64 holds every int32 sum exactly, on every device.
    acc = torch.matmul(qx.double(), qweight.double().mT).to(torch.int32)
    y = acc.float() * (scale_x[..., None] * scale)
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype)


def _int8_linear_cpu(
    x: torch.Tensor, qweight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    cpu, isa, threads = native.cpu_call()
    rows = native.as_rows(x)
    qweight = native.as_rows(qweight)
    scale = scale.contiguous()
    bias = None if bias is None else bias.float().contiguous()
    columns, depth = qweight.shape
    y = x.new_empty((*x.shape[:-1], columns))
    cpu.int8_linear(
        isa,
        threads,
        native.FLOAT_TYPES[x.dtype],
        rows.data_ptr(),
        rows.stride(0),
        qweight.data_ptr(),
        qweight.stride(0),
        scale.data_ptr(),
        native.address(bias),
        rows.shape[0],
        columns,
        depth,
        y.data_ptr(),
    )
    return y


def int8_linear_cuda(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    kernel: str = "best",
) -> torch.Tensor:
    """The CUDA kernels, of arguments that are checked; `kernel`: one of native.CUDA_KERNELS."""
    cuda, stream = native.cuda_call(x.device)
    rows, qweight = native.as_separate_rows(x), native.as_separate_rows(qweight)
    scale = scale.contiguous()
    bias = None if bias is None else bias.float().contiguous()
    columns, depth = qweight.shape
    y = x.new_empty((*x.shape[:-1], columns))
    qx_stride = -(-depth // 16) * 16
    qx = torch.empty((rows.shape[0], qx_stride), dtype=torch.int8, device=x.device)
    scale_x = torch.empty(rows.shape[0], dtype=torch.float32, device=x.device)
    with native.on_device(x.device):
        cuda.int8_linear(
            native.CUDA_KERNELS.index(kernel),
            native.FLOAT_TYPES[x.dtype],
            rows.data_ptr(),
            rows.stride(0),
            qweight.data_ptr(),
            qweight.stride(0),
            scale.data_ptr(),
            native.address(bias),
            rows.shape[0],
            columns,
            depth,
            y.data_ptr(),
            qx.data_ptr(),
            qx_stride,
            scale_x.data_ptr(),
            stream,
        )
    return y


def _int8_linear_triton(
    x: torch.Tensor, qweight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    from dtm_fast.triton_kernels.int8_linear import int8_linear as run

    return run(x, qweight, scale, bias)


_RUN = {
    "cpu": _int8_linear_cpu,
    "cuda": int8_linear_cuda,
    "triton": _int8_linear_triton,
    "reference": int8_linear_reference,
}


def _check(x: torch.Tensor, qweight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> None:
    checks.tensor("x", x, (torch.float32, torch.bfloat16))
    checks.at_least_one_dim("x", x)
    checks.tensor("qweight", qweight, (torch.int8,))
    checks.dims("qweight", qweight, "[N, K]", 2)
    checks.size("qweight", qweight, 1, x.shape[-1], "K of x")
    if qweight.shape[1] > MAX_K:
        raise ValueError(
            f"qweight: expected K <= {MAX_K} (int32 sums overflow above), got {qweight.shape[1]}"
        )
    checks.tensor("scale", scale, (torch.float32,))
    checks.dims("scale", scale, "[N]", 1)
    checks.size("scale", scale, 0, qweight.shape[0], "N of qweight")
    if bias is not None:
        checks.tensor("bias", bias, {x.dtype: None, torch.float32: None})
        checks.dims("bias", bias, "[N]", 1)
        checks.size("bias", bias, 0, qweight.shape[0], "N of qweight")
    checks.same_device("x", x, qweight=qweight, scale=scale, bias=bias)
    checks.no_gradient_needed("int8_linear", x, scale, bias)


def _run(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    _check(x, qweight, scale, bias)
    chosen = backends.choose("int8_linear", backend, x.device, x.dtype, checks.rows(x))
    checks.contents(checks.finite, "scale", scale)
    return _RUN[chosen](x, qweight, scale, bias)


def _fake(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    _check(x, qweight, scale, bias)
    return x.new_empty((*x.shape[:-1], qweight.shape[0]))


_OPERATOR = register(
    "int8_linear(Tensor x, Tensor qweight, Tensor scale, Tensor? bias=None, str? backend=None) -> Tensor",
    _run,
    _fake,
)
