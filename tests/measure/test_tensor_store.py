"""What does not fit into memory lies in a file that nobody sees, and is read as if it were in memory."""

import errno
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dtm_fast.errors import MeasurementError
from dtm_fast.measure.tensor_store import TensorStore

pytestmark = pytest.mark.once

DTYPES = [torch.float32, torch.bfloat16, torch.int64]


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    values = 100 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return values.to(dtype)


def bytes_of(value: Tensor) -> int:
    return value.numel() * value.element_size()


def mapped_files() -> list[str]:
    """The deleted files whose pages this process has mapped."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return [line.split(maxsplit=5)[5] for line in lines if line.endswith("(deleted)")]


def is_in(value: Tensor, folder: Path) -> bool:
    """Whether a tensor's memory is that of a file in the folder."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(each, 16) for each in line.split()[0].split("-"))
        if first <= value.data_ptr() < last:
            return str(folder) in line
    return False


def test_without_a_bound_everything_is_kept_as_it_is(tmp_path):
    store = TensorStore(folder=tmp_path)
    for index in range(5):
        value = drawn(1000, seed=index)
        assert store.put(index, value) is value
        assert store[index] is value
    assert (store.in_memory, store.spilled) == (5 * 4000, 0)


def test_up_to_the_bound_it_is_the_same_object_and_beyond_it_a_copy_in_a_file(tmp_path):
    store = TensorStore(8000, tmp_path)
    values = [drawn(1000, seed=index) for index in range(4)]
    kept = [store.put(index, value) for index, value in enumerate(values)]
    assert [each is value for each, value in zip(kept, values, strict=True)] == [True, True, False, False]
    assert [is_in(each, tmp_path) for each in kept] == [False, False, True, True]
    for index, value in enumerate(values):
        assert store[index] is kept[index]
        assert torch.equal(store[index], value)
    assert (store.in_memory, store.spilled) == (8000, 8000)


def test_what_still_fits_is_kept_in_memory_after_something_that_did_not(tmp_path):
    store = TensorStore(1000, tmp_path)
    for key, size in (("a", 100), ("large", 1000), ("b", 150), ("c", 1)):
        store.put(key, torch.zeros(size))
    assert (store.in_memory, store.spilled) == (1000, 4004)


def test_a_store_knows_what_it_keeps(tmp_path):
    store = TensorStore(0, tmp_path)
    store.put(("model", 0, 1), drawn(3))
    store.put("nothing", drawn(0))
    assert ("model", 0, 1) in store
    assert "nothing" in store
    assert ("model", 0, 2) not in store
    with pytest.raises(KeyError):
        store["model", 0, 2]


@settings(deadline=None, max_examples=60)
@given(
    shape=st.lists(st.integers(0, 9), max_size=4).map(tuple),
    dtype=st.sampled_from([*DTYPES, torch.float16, torch.float64, torch.bool, torch.uint8, torch.complex64]),
    bound=st.sampled_from([0, 100]),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_spilled_tensor_equals_what_was_put(shape, dtype, bound, seed):
    store, value = TensorStore(bound), drawn(*shape, dtype=dtype, seed=seed)
    kept = store.put(0, value)
    assert (kept.shape, kept.dtype) == (value.shape, value.dtype)
    assert torch.equal(kept, value)
    size = bytes_of(value)
    assert (store.in_memory, store.spilled) == ((size, 0) if size <= bound else (0, size))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_that_are_not_finite_keep_their_bits(dtype, tmp_path):
    value = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 1e-40], dtype=dtype)
    kept = TensorStore(0, tmp_path).put(0, value)
    assert torch.equal(kept.view(torch.uint8), value.view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.t(),
        lambda x: x[:, 3:7],
        lambda x: x[::2],
        lambda x: x[5:5],
        lambda x: x[:1].expand(9, -1),
    ],
    ids=["transposed", "columns", "every second row", "nothing", "expanded"],
)
def test_a_view_is_spilled_as_a_tensor_of_its_own(view, dtype, tmp_path):
    whole = drawn(20, 10, dtype=dtype)
    value = view(whole)
    store = TensorStore(0, tmp_path)
    kept, expected = store.put(0, value), value.clone()
    assert kept.is_contiguous()
    assert store.spilled == bytes_of(value)
    whole.zero_()
    assert torch.equal(kept, expected)


def test_a_spilled_tensor_outlives_its_store(tmp_path):
    store = TensorStore(0, tmp_path)
    value = drawn(100_000)
    kept = store.put(0, value)
    del store
    assert torch.equal(kept, value)


def test_the_room_is_given_back_with_the_tensors(tmp_path):
    store = TensorStore(0, tmp_path)
    kept = store.put(0, drawn(100_000))
    assert any(str(tmp_path) in each for each in mapped_files())
    del store, kept
    assert not any(str(tmp_path) in each for each in mapped_files())


def test_nothing_is_seen_in_the_folder_and_no_file_stays_open(tmp_path):
    before = os.listdir("/proc/self/fd")
    store = TensorStore(0, tmp_path)
    for index in range(20):
        store.put(index, drawn(50_000, seed=index))
        assert list(tmp_path.iterdir()) == []
    assert len(os.listdir("/proc/self/fd")) == len(before)
    assert all(torch.equal(store[index], drawn(50_000, seed=index)) for index in range(20))


def test_by_default_the_file_is_where_temporary_files_go(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    kept = TensorStore(0).put(0, drawn(1000))
    assert is_in(kept, tmp_path)


def fails_with(code: int):
    def posix_fallocate(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    return posix_fallocate


@pytest.mark.parametrize("by_default", [False, True])
def test_a_full_disk_is_named_with_the_size_that_was_wanted(tmp_path, monkeypatch, by_default):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(os, "posix_fallocate", fails_with(errno.ENOSPC))
    store = TensorStore(0, None if by_default else tmp_path)
    with pytest.raises(MeasurementError) as raised:
        store.put("large", torch.zeros(3 * 2**18))
    said = str(raised.value)
    assert said.startswith(f"{tmp_path}: no room for 3 MiB of the base's states: No space left on device")
    assert "\n" not in said
    assert "large" not in store
    assert (store.in_memory, store.spilled) == (0, 0)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(MeasurementError, match=r"missing: no room for 0 MiB .*: No such file or directory"):
        TensorStore(0, tmp_path / "missing").put(0, drawn(10))


SPILLS = """
import torch
from dtm_fast.measure.tensor_store import TensorStore

while True:
    store = TensorStore(0)
    for index in range(40):
        kept = store.put(index, torch.full((2**18,), index))
        print(index, flush=True)
"""


@pytest.mark.process
@pytest.mark.parametrize("delay", [0.003, 0.05])
def test_nothing_is_left_of_a_process_that_is_killed_while_it_spills(tmp_path, delay):
    with subprocess.Popen(
        [sys.executable, "-c", SPILLS], stdout=subprocess.PIPE, env=os.environ | {"TMPDIR": str(tmp_path)}
    ) as process:
        assert process.stdout.readline() == b"0\n"
        time.sleep(delay)
        assert process.poll() is None
        assert str(tmp_path) in Path(f"/proc/{process.pid}/maps").read_text()  # it does spill there
        assert list(tmp_path.iterdir()) == []
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert list(tmp_path.iterdir()) == []
