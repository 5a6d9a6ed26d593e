"""Every case of the regression gate runs on this revision."""

import importlib

import pytest
import torch

from benchmarks.gate import timing_child
from dtm_fast import ops
from dtm_fast.ops import native

pytestmark = pytest.mark.once


@pytest.mark.parametrize("case", timing_child.CASES, ids=lambda each: each.name)
def test_it_runs(case: timing_child.Case) -> None:
    if native.cpu_isa() == "reference":
        pytest.skip("the gate times native kernels")
    importlib.import_module("dtm_fast.ops.decoder_layer")
    found, results = timing_child.run(case, ops, seconds=0.0)
    assert set(found) == {"seconds"}, found
    assert results
    assert all(torch.isfinite(each.double()).all() for each in results)
