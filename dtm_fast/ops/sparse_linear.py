"""Linear layer over the kept entries of a weight, packed once."""

from typing import cast

import torch

from dtm_fast.ops import backends, checks, direct, native
from dtm_fast.ops.autocast import without_autocast
from dtm_fast.ops.library import is_recorded, register
from dtm_fast.ops.sparse_weight import SparseWeight, check_shapes, entries


def sparse_linear(
    x: torch.Tensor, weight: SparseWeight, bias: torch.Tensor | None = None, *, backend: str | None = None
) -> torch.Tensor:
    """Multiply by the kept entries of a weight; the others are neither stored nor touched.

    Equals `F.linear(x, weight.to_dense().to(x.dtype), bias)` for finite x. A NaN or infinity in x[..., k]
    reaches exactly the outputs whose row of the weight keeps column k. Products and sums are in float32; the
    order of a sum depends on neither the batch, the threads nor the instruction set (the reference twin sums
    as torch does).

    Args:
        x: [..., K], float32 or bfloat16.
        weight: SparseWeight [N, K].
        bias: [N], in the dtype of x, or None.
        backend: None (the best), "cpu" or "reference" (which alone has a backward).

    Returns:
        [..., N], in the dtype of x.

    Raises:
        TypeError: an argument is no dense tensor of such a dtype, or weight no SparseWeight.
        ValueError: shapes or devices do not fit; backend is unknown.
        RuntimeError: backend cannot run; autograd would need a backward and backend is not "reference".
    """
    if not isinstance(weight, SparseWeight):
        raise TypeError(f"weight: expected a SparseWeight, got {type(weight).__name__}")
    tensors = (weight.values, weight.columns, weight.rows, weight.steps)
    return packed_sparse_linear(x, *tensors, weight.N, weight.K, bias, backend)


def packed_sparse_linear(
    x: torch.Tensor,
    values: torch.Tensor,
    columns: torch.Tensor,
    rows: torch.Tensor,
    steps: torch.Tensor,
    N: int,  # noqa: N803
    K: int,  # noqa: N803
    bias: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """As sparse_linear, of the tensors of a SparseWeight."""
    if is_recorded(x, values, columns, rows, steps, bias):
        checks.no_gradient_needed("sparse_linear", x, values, bias)  # the operator has none
        return cast(torch.Tensor, _OPERATOR(x, values, columns, rows, steps, N, K, bias, backend))
    if backend is None:
        y = direct.run("sparse_linear", x, values, columns, rows, steps, N, K, bias)
        if y is not None:
            return y
    return _run(x, values, columns, rows, steps, N, K, bias, backend)


@without_autocast
def sparse_linear_reference(
    x: torch.Tensor,
    values: torch.Tensor,
    columns: torch.Tensor,
    rows: torch.Tensor,
    steps: torch.Tensor,
    N: int,  # noqa: N803
    K: int,  # noqa: N803
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """The reference twin: each output from the columns of x that its row keeps, and from no others."""
    n, k, value = entries(values, columns, rows, steps, N, K)
    counts = torch.bincount(n, minlength=N).tolist()
    wide = x.float()
    outputs = [
        wide[..., kept] @ kept_values
        for kept, kept_values in zip(k.split(counts), value.split(counts), strict=True)
    ]
    y = torch.stack(outputs, dim=-1) if outputs else wide.new_empty((*x.shape[:-1], 0))
    return (y if bias is None else y + bias.float()).to(x.dtype)


def _sparse_linear_cpu(
    x: torch.Tensor,
    values: torch.Tensor,
    columns: torch.Tensor,
    rows: torch.Tensor,
    steps: torch.Tensor,
    N: int,  # noqa: N803
    K: int,  # noqa: N803
    bias: torch.Tensor | None,
) -> torch.Tensor:
    cpu, isa, threads = native.cpu_call()
    x_rows = native.as_rows(x)
    bias = None if bias is None else bias.float().contiguous()
    y = x.new_empty((*x.shape[:-1], N))
    cpu.sparse_linear(
        isa,
        threads,
        native.FLOAT_TYPES[x.dtype],
        x_rows.data_ptr(),
        x_rows.stride(0),
        values.data_ptr(),
        values.shape[0],
        columns.data_ptr(),
        columns.shape[0],
        rows.data_ptr(),
        steps.data_ptr(),
        N,
        K,
        native.address(bias),
        x_rows.shape[0],
        y.data_ptr(),
    )
    return y


def _check(
    x: torch.Tensor,
    values: torch.Tensor,
    columns: torch.Tensor,
    rows: torch.Tensor,
    steps: torch.Tensor,
    N: int,  # noqa: N803
    K: int,  # noqa: N803
    bias: torch.Tensor | None,
) -> None:
    checks.tensor("x", x, (torch.float32, torch.bfloat16))
    checks.at_least_one_dim("x", x)
    checks.size("x", x, x.dim() - 1, K, "K of weight")
    check_shapes(values, columns, rows, steps, N, K)
    if bias is not None:
        checks.tensor("bias", bias, (x.dtype,))
        checks.dims("bias", bias, "[N]", 1)
        checks.size("bias", bias, 0, N, "N of weight")
    checks.same_device("x", x, weight=values, bias=bias)


def _run(
    x: torch.Tensor,
    values: torch.Tensor,
    columns: torch.Tensor,
    rows: torch.Tensor,
    steps: torch.Tensor,
    N: int,  # noqa: N803
    K: int,  # noqa: N803
    bias: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    _check(x, values, columns, rows, steps, N, K, bias)
    if backend != "reference":
        checks.no_gradient_needed("sparse_linear", x, values, bias)
    chosen = backends.choose("sparse_linear", backend, x.device)
    run = _sparse_linear_cpu if chosen == "cpu" else sparse_linear_reference
    return run(x, values, columns, rows, steps, N, K, bias)


def _fake(
    x: torch.Tensor,
    values: torch.Tensor,
    columns: torch.Tensor,
    rows: torch.Tensor,
    steps: torch.Tensor,
    N: int,  # noqa: N803
    K: int,  # noqa: N803
    bias: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    _check(x, values, columns, rows, steps, N, K, bias)
    return x.new_empty((*x.shape[:-1], N))


_OPERATOR = register(
    "sparse_linear(Tensor x, Tensor values, Tensor columns, Tensor rows, Tensor steps, SymInt N, SymInt K, "
    "Tensor? bias=None, str? backend=None) -> Tensor",
    _run,
    _fake,
)
