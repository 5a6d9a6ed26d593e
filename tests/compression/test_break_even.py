"""The rule, not the speed: which layer the table gives."""

import itertools

import pytest
import torch

from dtm_fast import nn
from dtm_fast.compression import break_even
from dtm_fast.compression.break_even import SMALLEST, TABLE, BreakEven, faster_layer
from dtm_fast.ops import native


@pytest.fixture
def even(monkeypatch: pytest.MonkeyPatch) -> BreakEven:
    reason = native.why_no_cpu_kernels()
    if reason is not None:
        pytest.skip(reason)
    row = BreakEven(token=0.6, prompt=0.1, both=0.5)
    monkeypatch.setattr(break_even, "TABLE", dict.fromkeys(TABLE, row))
    return row


def weight_of(density: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Just large enough; so many of its entries are not 0."""
    n = SMALLEST[dtype] // 256
    weight = torch.zeros(n * 256, dtype=dtype)
    weight[: round(density * n * 256)] = 1.5
    return weight.view(n, 256)


def test_the_table_knows_every_instruction_set_and_dtype() -> None:
    assert set(TABLE) == set(itertools.product(SMALLEST, native.ISAS[1:]))
    for row in TABLE.values():
        assert 0 < row.prompt <= 1
        assert min(row.token, row.prompt) <= row.both <= max(row.token, row.prompt)


@pytest.mark.parametrize("dtype", SMALLEST)
def test_below_the_density_for_both_it_is_a_sparse_layer(even: BreakEven, dtype: torch.dtype) -> None:
    assert faster_layer(weight_of(0.5, dtype))[0] is None
    kind, reason = faster_layer(weight_of(0.49, dtype))
    assert kind is nn.SparseLinear
    short = str(dtype).removeprefix("torch.")
    assert reason == (
        "density 0.49; a sparse product is faster below 0.6 for one token, below 0.1 for a prompt of 256 "
        f"({short}, {native.cpu_isa()})"
    )
    assert faster_layer(weight_of(0.0, dtype))[0] is nn.SparseLinear


def test_above_it_is_a_masked_layer_where_that_is_faster_and_else_none(
    even: BreakEven, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = f"(float32, {native.cpu_isa()})"
    assert faster_layer(weight_of(1.0)) == (
        None,
        f"density 1.00; a sparse product is faster below 0.5, no dense one of ours {where}",
    )
    full = BreakEven(0.6, 0.1, 0.5, full=True)
    monkeypatch.setattr(break_even, "TABLE", dict.fromkeys(TABLE, full))
    kind, reason = faster_layer(weight_of(1.0))
    assert kind is nn.MaskedLinear
    assert reason == f"density 1.00; our dense product is faster than torch's for one token {where}"


@pytest.mark.parametrize("dtype", SMALLEST)
def test_small_weights_stay_with_torch(even: BreakEven, dtype: torch.dtype) -> None:
    kind, reason = faster_layer(weight_of(0.1, dtype)[:-1])
    assert kind is None
    assert reason.startswith("density 0.1")
    assert "too small" in reason
    assert faster_layer(torch.zeros(0, 5))[0] is None


def test_without_a_kernel_there_is_no_faster_layer_but_a_reason(even: BreakEven) -> None:
    assert faster_layer(weight_of(0.1).half()) == (None, "no kernel for float16")
    assert faster_layer(weight_of(0.1).to("meta")) == (
        None,
        "our kernels cannot run: no kernel for meta tensors: torch operations on the device",
    )
    with native.use_cpu_isa("reference"):
        assert faster_layer(weight_of(0.1)) == (
            None,
            "our kernels cannot run: DTM_FAST_CPU_ISA=reference is set",
        )
