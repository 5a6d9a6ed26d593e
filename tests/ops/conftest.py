"""Fixtures: the backends and instruction sets that this machine can run."""

from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

from dtm_fast.ops import native


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What goes through the machine's instruction sets itself is the same whichever one is forced."""
    for item in items:
        if {"isa", "isas"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.once)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def native_cuda(cuda: torch.device) -> ModuleType:
    """The CUDA kernels. Where there is a GPU they must be there: skipping would pass for having tested them."""
    module, reason = native.load("_cuda")
    assert module is not None, reason
    return module


@pytest.fixture(params=["cpu", "reference"])
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend in turn, the native one as DTM_FAST_CPU_ISA sets it."""
    reason = native.why_no_cpu_kernels()
    if request.param == "cpu" and reason is not None:
        pytest.skip(reason)
    return str(request.param)


@pytest.fixture(params=native.ISAS[1:])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each native instruction set of the machine in turn, in use for the whole test."""
    if request.param not in native_isas():
        pytest.skip(f"this machine cannot run {request.param} kernels")
    with native.use_cpu_isa(request.param):
        yield request.param


@pytest.fixture(scope="session")
def isas() -> tuple[str, ...]:
    """All native instruction sets of the machine."""
    if not native_isas():
        pytest.skip("no native kernels here")
    return native_isas()


@pytest.fixture
def threads() -> Iterator[None]:
    """Lets a test change the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def native_isas() -> tuple[str, ...]:
    detected = native.detected_cpu_isa()
    return () if detected is None else native.ISAS[1 : native.ISAS.index(detected) + 1]
