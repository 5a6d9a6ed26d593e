"""The row kernels are launched on the device of their arguments, also where another one is current."""

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", exc_type=ImportError)

from dtm_fast.triton_kernels import layer_rows

pytestmark = pytest.mark.once


def rows() -> Tensor:
    return torch.randn(3, 8)


CALLS: dict[str, Callable[[], object]] = {
    "rms_norm": lambda: layer_rows.rms_norm(rows(), torch.ones(8), 1e-5),
    "add_norm": lambda: layer_rows.add_norm(rows(), rows(), torch.ones(8), 1e-5),
    "rotate": lambda: layer_rows.rotate(torch.randn(2, 3, 4, 8), rows(), rows()),
    "gated": lambda: layer_rows.gated(rows(), rows()),
    "change_norm": lambda: layer_rows.change_norm(rows(), rows(), torch.ones(8), 1e-5),
    "change_gated": lambda: layer_rows.change_gated(rows(), rows(), rows(), None),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_row_kernel_is_launched_on_the_device_of_its_arguments(monkeypatch, call):
    current: list[torch.device] = []
    launches: list[list[torch.device]] = []

    class Kernel:
        def __getitem__(self, grid: object) -> Callable[..., None]:
            return lambda *arguments, **options: launches.append(list(current))

    @contextlib.contextmanager
    def current_device_of(x: Tensor) -> Iterator[None]:
        current.append(x.device)
        yield
        current.pop()

    monkeypatch.setattr(layer_rows, "current_device_of", current_device_of)
    for name in [each for each in vars(layer_rows) if each.endswith("_kernel")]:
        monkeypatch.setattr(layer_rows, name, Kernel())
    call()
    assert launches == [[torch.device("cpu")]]
