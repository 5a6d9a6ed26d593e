"""Linear layer with a bitmask over its weight; several masks of one weight in one pass."""

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F

from dtm_fast.ops import backends, checks, direct, native
from dtm_fast.ops.autocast import without_autocast
from dtm_fast.ops.library import is_differentiated, is_recorded, register
from dtm_fast.ops.mask_bits import check_packed, unpack_mask_reference
from dtm_fast.ops.masked_ladder import check_nested, masked_ladder_cpu, masked_ladder_reference
from dtm_fast.ops.masked_linear_backward import backward, setup_context


def masked_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    mask: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    nested: bool = False,
    backend: str | None = None,
) -> torch.Tensor:
    """Multiply by the weights that a packed mask keeps, without making a masked copy of the weight.

    Equals `F.linear(x, torch.where(unpack_mask(mask, K), weight, 0), bias)`, for V masks stacked V times.
    A weight that is masked out does not count, even if it is NaN; NaN and infinity in x spread as in the
    dense product. Sums are in float32, and their order depends on neither the batch nor the threads. It is the
    same for all instruction sets, but for AMX and, in bfloat16, AVX512-BF16, which have their own and take
    denormal numbers as zero (the reference twin sums as torch does). AMX multiplies float32 as the sum of three
    numbers of bfloat16, with less error than torch's product has; but numbers below 2^-102 lose digits, in x
    where a larger one than 2^-60 is in their row.
    Differentiable in x, weight and bias; masked_linear_backward.py says what its backward costs.

    With nested=True one pass over the weight gives the outputs of a ladder of masks, such as magnitude masks of
    rising sparsity: the products of the sparsest mask are summed first, each denser one continues with those it
    adds. So the last bits of y[v] depend on the masks v to V - 1, but not on the masks before v, the batch, the
    threads or the instruction set. A NaN or infinity in x[..., k] then reaches exactly the outputs whose row
    keeps column k. It pays where there are many tokens, as the masks are sorted out and packed in every call; not
    for bfloat16 on AMX, whose separate products are as fast.

    Args:
        x: [..., K], float32 or bfloat16.
        weight: [N, K], in the dtype of x.
        mask: [N, ceil(K / 8)] or [V, N, ceil(K / 8)] uint8, as pack_mask makes it.
        bias: [N], in the dtype of x, or None.
        nested: whether mask[v + 1] keeps a part of what mask[v] keeps, for each v; needs V masks.
        backend: None (the best), "cpu", "cuda", "triton" or "reference"; for nested masks on a GPU "reference".

    Returns:
        [..., N], or [V, ..., N] for V masks, in the dtype of x.

    Raises:
        TypeError: an argument is no dense tensor of such a dtype.
        ValueError: shapes or devices do not fit, mask has bits set beyond K, or masks are not nested as said;
            backend is unknown.
        RuntimeError: backend cannot run.

    Source: panels packed for the cache as in Goto & van de Geijn 2008, the mask applied while packing; float32 in
    bfloat16 as in Henry, Tang, Heinecke 2019.
    """
    if backend != "reference":
        checks.no_tangent("masked_linear", x, weight, bias)
    if is_recorded(x, weight, mask, bias) and not is_differentiated():
        return cast(torch.Tensor, _OPERATOR(x, weight, mask, bias, backend, nested))
    if (
        backend is None
        and not nested
        and (y := direct.run("masked_linear", x, weight, mask, bias)) is not None
    ):
        return y
    # The backward of the reference twin is what torch derives from it.
    if backend != "reference" and checks.gradient_needed(x, weight, bias):
        return _differentiable(x, weight, mask, bias, backend, nested)
    return _run(x, weight, mask, bias, backend, nested)


@without_autocast
def masked_linear_reference(
    x: torch.Tensor, weight: torch.Tensor, mask: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """The reference twin."""
    kept = unpack_mask_reference(mask, weight.shape[1])
    if mask.dim() == 2:
        return F.linear(x, torch.where(kept, weight, 0), bias)
    variants = [F.linear(x, torch.where(each, weight, 0), bias) for each in kept]
    return torch.stack(variants) if variants else x.new_empty((0, *x.shape[:-1], weight.shape[0]))


def _masked_linear_cpu(
    x: torch.Tensor, weight: torch.Tensor, mask: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    cpu, isa, threads = native.cpu_call()
    rows = native.as_rows(x)
    weight = native.as_rows(weight)
    masks = mask if mask.dim() == 3 else mask[None]
    if masks.stride(-1) != 1:
        masks = masks.contiguous()
    bias = None if bias is None else bias.float().contiguous()
    columns, depth = weight.shape
    y = x.new_empty((*mask.shape[:-2], *x.shape[:-1], columns))
    cpu.masked_linear(
        isa,
        threads,
        native.FLOAT_TYPES[x.dtype],
        rows.data_ptr(),
        rows.stride(0),
        weight.data_ptr(),
        weight.stride(0),
        masks.data_ptr(),
        masks.stride(1),
        masks.stride(0),
        native.address(bias),
        masks.shape[0],
        rows.shape[0],
        columns,
        depth,
        y.data_ptr(),
    )
    return y


def masked_linear_cuda(
    x: torch.Tensor,
    weight: torch.Tensor,
    mask: torch.Tensor,
    bias: torch.Tensor | None,
    kernel: str = "best",
) -> torch.Tensor:
    """The CUDA kernels, of arguments that are checked; `kernel`: one of native.CUDA_KERNELS."""
    cuda, stream = native.cuda_call(x.device)
    rows, weight = native.as_separate_rows(x), native.as_separate_rows(weight)
    masks = mask if mask.dim() == 3 else mask[None]
    if masks.stride(-1) != 1:
        masks = masks.contiguous()
    bias = None if bias is None else bias.float().contiguous()
    columns, depth = weight.shape
    y = x.new_empty((*mask.shape[:-2], *x.shape[:-1], columns))
    with native.on_device(x.device):
        cuda.masked_linear(
            native.CUDA_KERNELS.index(kernel),
            native.FLOAT_TYPES[x.dtype],
            rows.data_ptr(),
            rows.stride(0),
            weight.data_ptr(),
            weight.stride(0),
            masks.data_ptr(),
            masks.stride(1),
            masks.stride(0),
            native.address(bias),
            masks.shape[0],
            rows.shape[0],
            columns,
            depth,
            y.data_ptr(),
            stream,
        )
    return y


def _masked_linear_triton(
    x: torch.Tensor, weight: torch.Tensor, mask: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    from dtm_fast.triton_kernels.masked_linear import masked_linear as run

    return run(x, weight, mask, bias)


_RUN = {
    "cpu": _masked_linear_cpu,
    "cuda": masked_linear_cuda,
    "triton": _masked_linear_triton,
    "reference": masked_linear_reference,
}


def _check(
    x: torch.Tensor, weight: torch.Tensor, mask: torch.Tensor, bias: torch.Tensor | None, nested: bool
) -> None:
    checks.tensor("x", x, (torch.float32, torch.bfloat16))
    checks.at_least_one_dim("x", x)
    checks.tensor("weight", weight, (x.dtype,))
    checks.dims("weight", weight, "[N, K]", 2)
    checks.size("weight", weight, 1, x.shape[-1], "K of x")
    check_packed("mask", mask, weight.shape[1])
    if nested:
        checks.dims("mask", mask, "[V, N, ceil(K / 8)] for nested masks", 3)
    else:
        checks.dims("mask", mask, "[N, ceil(K / 8)] or [V, N, ceil(K / 8)]", 2, 3)
    checks.size("mask", mask, mask.dim() - 2, weight.shape[0], "N of weight")
    if bias is not None:
        checks.tensor("bias", bias, (x.dtype,))
        checks.dims("bias", bias, "[N]", 1)
        checks.size("bias", bias, 0, weight.shape[0], "N of weight")
    checks.same_device("x", x, weight=weight, mask=mask, bias=bias)


def _run(
    x: torch.Tensor,
    weight: torch.Tensor,
    mask: torch.Tensor,
    bias: torch.Tensor | None = None,
    backend: str | None = None,
    nested: bool = False,
) -> torch.Tensor:
    _check(x, weight, mask, bias, nested)
    chosen = backends.choose("masked_linear", backend, x.device, x.dtype, checks.rows(x))
    checks.contents(checks.padding_bits_zero, "mask", mask, weight.shape[1])
    if nested:
        checks.contents(check_nested, "mask", mask)
        if backend in ("cuda", "triton"):
            raise RuntimeError(f"masked_linear: backend {backend!r} cannot run: no kernel for nested masks")
        run = masked_ladder_cpu if chosen == "cpu" else masked_ladder_reference
        return run(x, weight, mask, bias)
    return _RUN[chosen](x, weight, mask, bias)


def _fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    mask: torch.Tensor,
    bias: torch.Tensor | None = None,
    backend: str | None = None,
    nested: bool = False,
) -> torch.Tensor:
    _check(x, weight, mask, bias, nested)
    return x.new_empty((*mask.shape[:-2], *x.shape[:-1], weight.shape[0]))


class _Differentiable(torch.autograd.Function):
    """Eager autograd. The operator's own backward would do, but torch.func.grad cannot use that."""

    forward = staticmethod(_run)
    setup_context = staticmethod(setup_context)
    backward = staticmethod(backward)


_differentiable: Callable[..., torch.Tensor] = _Differentiable.apply

_OPERATOR = register(
    "masked_linear(Tensor x, Tensor weight, Tensor mask, Tensor? bias=None, str? backend=None, "
    "bool nested=False) -> Tensor",
    _run,
    _fake,
    setup_context=setup_context,
    backward=backward,
)
