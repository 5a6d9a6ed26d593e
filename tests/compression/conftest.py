"""Fixtures of the tests of accelerated models."""

import pytest
import tiny
from acceleration import FAMILIES, use

from dtm_fast.compression import break_even
from dtm_fast.ops import native


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest):
    return tiny.model_of(request.param)


@pytest.fixture
def kernels() -> None:
    reason = native.why_no_cpu_kernels()
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture
def sparse_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, break_even.BreakEven(token=0.9, prompt=0.9, both=0.9))
