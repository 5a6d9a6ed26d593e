"""Memory on large pages: a tensor like any other."""

import copy
import pickle
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dtm_fast import nn, ops
from dtm_fast.ops import large_pages, native

PAGE = 2 * 2**20


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0,), (3, 5), (1025, 4099), (2, 1024, 2048)], ids=str)
def test_it_is_a_tensor_of_its_shape(shape, dtype):
    (made,) = large_pages.empty((shape, dtype))
    assert (made.shape, made.dtype, made.device.type) == (shape, dtype, "cpu")
    assert made.is_contiguous()
    assert made.untyped_storage().nbytes() == made.nbytes
    if made.nbytes >= PAGE:
        assert made.data_ptr() % PAGE == 0
    values = torch.randint(0, 100, shape).to(dtype)
    made.copy_(values)
    assert torch.equal(made, values)


def test_parts_lie_side_by_side_and_are_tensors_of_their_own(tmp_path):
    shapes = [
        ((1000, 999), torch.float32),
        ((0, 4), torch.int16),
        ((77,), torch.uint8),
        ((5, 1001), torch.int16),
    ]
    made = large_pages.empty(*shapes)
    values = [torch.randint(0, 100, shape).to(dtype) for shape, dtype in shapes]
    for part, value in zip(made, values, strict=True):
        part.copy_(value)
    save_file({str(i): part for i, part in enumerate(made)}, tmp_path / "made.safetensors")
    stored = load_file(tmp_path / "made.safetensors")
    for i, (part, value) in enumerate(zip(made, values, strict=True)):
        assert torch.equal(part, value)
        assert torch.equal(stored[str(i)], value)
        assert part.untyped_storage().nbytes() == part.nbytes
        assert part.data_ptr() % 64 == 0
    assert made[3].data_ptr() - made[0].data_ptr() < made[0].nbytes + 1000


def test_it_can_be_copied_and_stored(tmp_path):
    (made,) = large_pages.empty(((1024, 5000), torch.int8))
    made.random_(-128, 128)
    save_file({"made": made}, tmp_path / "made.safetensors")
    assert torch.equal(load_file(tmp_path / "made.safetensors")["made"], made)
    assert (tmp_path / "made.safetensors").stat().st_size < made.nbytes + 1000
    assert len(pickle.dumps(made)) < made.nbytes + 1000
    for other in (copy.deepcopy(made), made.clone(), pickle.loads(pickle.dumps(made))):
        assert torch.equal(other, made)
        assert other.data_ptr() != made.data_ptr()


def test_it_lives_as_long_as_a_view_and_no_longer():
    def mapped() -> int:
        return sum(1 for line in Path("/proc/self/maps").read_text().splitlines() if "rw-p" in line)

    before = mapped()
    parts = [large_pages.empty(((5000, 1024), torch.int8))[0].fill_(7)[1:, 3:] for _ in range(20)]
    assert all(bool((part == 7).all()) for part in parts)
    del parts
    assert mapped() < before + 20


def test_nothing_is_asked_for_where_there_is_nothing_to_ask(monkeypatch):
    monkeypatch.delattr("mmap.MADV_HUGEPAGE")
    (made,) = large_pages.empty(((1024, 5000), torch.int8))
    assert made.fill_(1).sum(dtype=torch.int64) == 1024 * 5000


def test_the_default_device_of_the_program_changes_nothing():
    with torch.device("meta"):
        (made,) = large_pages.empty(((1024, 5000), torch.int8))
        assert made.device.type == "cpu"


def test_only_what_is_large_is_moved():
    small, large = torch.ones(1000, dtype=torch.int8), torch.ones(1024, 5000, dtype=torch.int8)[:, 1:].t()
    assert large_pages.moved(small) is small
    assert torch.equal(large_pages.moved(large), large)
    assert large_pages.moved(large).is_contiguous()
    meta = large.to("meta")
    assert large_pages.moved(meta) is meta


def on_large_pages(value: torch.Tensor) -> int:
    """Bytes of the mapping that holds a tensor, or some of it."""
    found = -1
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            first, end = (int(each, 16) for each in bounds.groups())
            inside = first <= value.data_ptr() < end
        elif inside and line.startswith("AnonHugePages:"):
            found = max(found, int(line.split()[1]) * 1024)
    return found


def test_packed_weights_lie_on_them():
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[never]" in setting.read_text():
        pytest.skip("this Linux gives no large pages")
    if native.cpu_isa() == "reference":
        pytest.skip("the reference twins pack where torch puts it")
    linear = torch.nn.Linear(4096, 2048)
    layer = nn.Int8Linear.from_linear(linear)
    packed = ops.SparseWeight.pack(linear.weight, ops.pack_mask(torch.rand(2048, 4096) < 0.5))
    # Of both: a machine whose memory is in pieces does not grant all of the pages.
    assert on_large_pages(layer.weight) + on_large_pages(packed.values) >= PAGE
