"""Linear layer over a bitmap-packed weight: the sparse layer of a GPU, where few tokens wait for the weight."""

from typing import cast

import torch
import torch.nn.functional as F

from dtm_fast.ops import backends, checks, native
from dtm_fast.ops.autocast import without_autocast
from dtm_fast.ops.bitmap_weight import BitmapWeight, check_shapes
from dtm_fast.ops.library import is_recorded, register

MOST_TOKENS = 16
"""Up to so many rows of x the kernel takes; for more the weight is expanded."""


def bitmap_linear(
    x: torch.Tensor, weight: BitmapWeight, bias: torch.Tensor | None = None, *, backend: str | None = None
) -> torch.Tensor:
    """Multiply by a weight of which a bitmap says which entries are kept, and only these are stored.

    Equals `F.linear(x, weight.to_dense(), bias)`. With up to 16 tokens on a GPU it reads only what is stored, and sums
    in float32 in an order that does not depend on the batch; with more, and with backend "reference", the weight is
    expanded and torch multiplies. For the CPU there is sparse_linear.

    Args:
        x: [..., K], in the dtype of the weight.
        weight: BitmapWeight [N, K].
        bias: [N], in the dtype of x, or None.
        backend: None (the best), "cuda", "triton" or "reference" (which alone has a backward, for x and bias).

    Returns:
        [..., N], in the dtype of x.

    Raises:
        TypeError: an argument is no dense tensor of such a dtype, or weight no BitmapWeight.
        ValueError: shapes or devices do not fit; backend is unknown.
        RuntimeError: backend cannot run; autograd would need a backward and backend is not "reference".
    """
    if not isinstance(weight, BitmapWeight):
        raise TypeError(f"weight: expected a BitmapWeight, got {type(weight).__name__}")
    packed = (weight.bits, weight.begins, weight.values, weight.N, weight.K)
    if is_recorded(x, weight.values, weight.bits, weight.begins, bias):
        checks.no_gradient_needed("bitmap_linear", x, weight.values, bias)  # the operator has none
        return cast(torch.Tensor, _OPERATOR(x, *packed, bias, backend))
    return _run(x, *packed, bias, backend)


@without_autocast
def bitmap_linear_reference(x: torch.Tensor, weight: BitmapWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """The reference twin."""
    return F.linear(x, weight.to_dense(), bias)


def _bitmap_linear_cuda(x: torch.Tensor, weight: BitmapWeight, bias: torch.Tensor | None) -> torch.Tensor:
    if checks.rows(x) > MOST_TOKENS:
        return bitmap_linear_reference(x, weight, bias)
    cuda, stream = native.cuda_call(x.device)
    rows = native.as_separate_rows(x)
    bias = None if bias is None else bias.float().contiguous()
    y = x.new_empty((*x.shape[:-1], weight.N))
    with native.on_device(x.device):
        cuda.bitmap_linear(
            native.FLOAT_TYPES[x.dtype],
            rows.data_ptr(),
            rows.stride(0),
            weight.bits.data_ptr(),
            weight.begins.data_ptr(),
            weight.values.data_ptr(),
            native.address(bias),
            rows.shape[0],
            weight.N,
            weight.K,
            y.data_ptr(),
            stream,
        )
    return y


def _bitmap_linear_triton(x: torch.Tensor, weight: BitmapWeight, bias: torch.Tensor | None) -> torch.Tensor:
    from dtm_fast.triton_kernels.bitmap_linear import bitmap_linear as run

    if checks.rows(x) > MOST_TOKENS:
        return bitmap_linear_reference(x, weight, bias)
    return run(x, weight, bias)


_RUN = {"cuda": _bitmap_linear_cuda, "triton": _bitmap_linear_triton, "reference": bitmap_linear_reference}


def _check(
    x: torch.Tensor,
    bits: torch.Tensor,
    begins: torch.Tensor,
    values: torch.Tensor,
    N: int,  # noqa: N803
    K: int,  # noqa: N803
    bias: torch.Tensor | None,
) -> None:
    check_shapes(bits, begins, values, N, K)
    checks.tensor("x", x, (values.dtype,))
    checks.at_least_one_dim("x", x)
    checks.size("x", x, x.dim() - 1, K, "K of weight")
    if bias is not None:
        checks.tensor("bias", bias, (x.dtype,))
        checks.dims("bias", bias, "[N]", 1)
        checks.size("bias", bias, 0, N, "N of weight")
    checks.same_device("x", x, weight=values, bias=bias)


def _run(
    x: torch.Tensor,
    bits: torch.Tensor,
    begins: torch.Tensor,
    values: torch.Tensor,
    N: int,  # noqa: N803
    K: int,  # noqa: N803
    bias: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    _check(x, bits, begins, values, N, K, bias)
    if backend != "reference":
        checks.no_gradient_needed("bitmap_linear", x, values, bias)
    chosen = backends.choose("bitmap_linear", backend, x.device, x.dtype, checks.rows(x))
    return _RUN[chosen](x, BitmapWeight.trusted(bits, begins, values, N, K), bias)


def _fake(
    x: torch.Tensor,
    bits: torch.Tensor,
    begins: torch.Tensor,
    values: torch.Tensor,
    N: int,  # noqa: N803
    K: int,  # noqa: N803
    bias: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    _check(x, bits, begins, values, N, K, bias)
    return x.new_empty((*x.shape[:-1], N))


_OPERATOR = register(
    "bitmap_linear(Tensor x, Tensor bits, Tensor begins, Tensor values, SymInt N, SymInt K, Tensor? bias=None, "
    "str? backend=None) -> Tensor",
    _run,
    _fake,
)
