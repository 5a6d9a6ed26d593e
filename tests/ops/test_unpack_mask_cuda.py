"""The CUDA kernel against its twin, bit for bit, and that it writes nothing else and waits for nobody."""

import pytest
import torch
from torch import Tensor

from dtm_fast import ops
from dtm_fast.ops.mask_bits import unpack_mask_reference

pytestmark = pytest.mark.gpu

SHAPES = [
    (507, 123),
    (3, 513),
    (1, 1),
    (4, 8),
    (2, 64),
    (2, 7),
    (0, 9),
    (9, 0),
    (0, 0),
    (17,),
    (2, 3, 33),
    (1000, 4097),
    (1, 3_000_001),
    (100_003, 5),
]
GUARD = 0xAB
A_LONG_TIME = 1_000_000_000  # clock cycles that a stream waits: half a second or so


@pytest.fixture
def kernel(cuda, native_cuda):
    """The native function on (packed, K, mask): contiguous tensors that may begin anywhere."""

    def run(packed: Tensor, columns: int, mask: Tensor) -> None:
        stream = torch.cuda.current_stream().cuda_stream
        native_cuda.unpack_mask(packed.data_ptr(), len(packed), columns, mask.data_ptr(), stream)

    return run


def random_packed(rows: int, columns: int, device: torch.device) -> Tensor:
    return ops.pack_mask(torch.rand(rows, columns, device=device) < 0.5)


def warm(packed: Tensor, stream: torch.cuda.Stream) -> None:
    """Loads the kernel and takes the memory: either may wait for the whole GPU, the first time."""
    with torch.cuda.stream(stream):
        torch.cuda._sleep(1)
        ops.unpack_mask(packed, packed.shape[1] * 8, backend="cuda")
    torch.cuda.synchronize()


@pytest.mark.parametrize("shape", SHAPES)
def test_it_agrees_with_the_twin_and_the_mask(kernel, cuda, shape):
    mask = torch.rand(shape) < 0.5
    packed = ops.pack_mask(mask).to(cuda)
    for backend in ("cuda", "reference", None):
        unpacked = ops.unpack_mask(packed, shape[-1], backend=backend)
        assert (unpacked.device, unpacked.dtype) == (packed.device, torch.bool)
        assert torch.equal(unpacked.cpu(), mask)
    # torch takes any byte but 0 for True: the bytes themselves must be 0 and 1.
    assert torch.equal(
        ops.unpack_mask(packed, shape[-1], backend="cuda").view(torch.uint8).cpu(), mask.byte()
    )


@pytest.mark.parametrize("columns", [*range(1, 40), 127, 128, 129, 255, 256, 257, 1023, 1024, 1025])
def test_every_tail(kernel, cuda, columns):
    packed = random_packed(37, columns, cuda)
    expected = unpack_mask_reference(packed, columns)
    assert torch.equal(ops.unpack_mask(packed, columns, backend="cuda"), expected)


@pytest.mark.parametrize("shape", [(5, 64), (64, 64), (13, 77), (7, 129)])
@pytest.mark.parametrize("offset", [1, 2, 3, 4, 7, 8, 12, 15, 16, 31])
def test_addresses_that_are_not_aligned(kernel, cuda, shape, offset):
    rows, columns = shape
    packed = random_packed(rows, columns, cuda)
    size = packed.numel()
    storage = torch.full((size + 64,), 0xFF, dtype=torch.uint8, device=cuda)
    shifted = storage[offset : offset + size].view(packed.shape)
    shifted.copy_(packed)
    expected = unpack_mask_reference(packed, columns)
    assert torch.equal(ops.unpack_mask(shifted, columns, backend="cuda"), expected)
    written = torch.full((rows * columns + 64,), GUARD, dtype=torch.uint8, device=cuda)
    inside = written[offset : offset + rows * columns]
    kernel(shifted, columns, inside)
    assert torch.equal(inside.view(rows, columns), expected.byte())
    assert bool((written[:offset] == GUARD).all())
    assert bool((written[offset + rows * columns :] == GUARD).all())


def test_views(kernel, cuda):
    packed = random_packed(40, 300, cuda)
    expected = unpack_mask_reference(packed, 300)
    strided = torch.stack([packed, packed], dim=-1)[..., 0]
    assert torch.equal(ops.unpack_mask(strided, 300, backend="cuda"), expected)
    assert torch.equal(ops.unpack_mask(packed[3::2], 300, backend="cuda"), expected[3::2])
    assert torch.equal(ops.unpack_mask(packed[:, 1:], 292, backend="cuda"), expected[:, 8:])
    many = packed.expand(2, 3, 40, 38)
    assert torch.equal(ops.unpack_mask(many, 300, backend="cuda"), expected.expand(2, 3, 40, 300))


def test_more_than_2_to_the_31_entries(kernel, cuda):
    rows, columns = 70_001, 32_771
    if torch.cuda.mem_get_info(cuda)[0] < 12 * 2**30:
        pytest.skip("12 GiB of free GPU memory are needed")
    packed = torch.randint(0, 256, (rows, (columns + 7) // 8), dtype=torch.uint8, device=cuda)
    packed[:, -1] &= 2 ** (columns % 8) - 1
    unpacked = ops.unpack_mask(packed, columns, backend="cuda")
    for start in range(0, rows, 7000):
        part = slice(start, start + 7000)
        assert torch.equal(unpacked[part], unpack_mask_reference(packed[part], columns))


def test_it_runs_on_the_current_stream_behind_what_is_queued_there(kernel, cuda):
    real = random_packed(512, 4096, cuda)
    late = torch.zeros_like(real)
    expected = unpack_mask_reference(real, 4096)
    stream = torch.cuda.Stream()
    warm(real, stream)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(A_LONG_TIME // 5)
        late.copy_(real)
        unpacked = ops.unpack_mask(late, 4096, backend="cuda")
        assert not stream.query()  # the kernel was queued, not waited for
    stream.synchronize()
    assert torch.equal(unpacked, expected)


def test_it_does_not_wait_for_another_stream(kernel, cuda):
    packed = random_packed(512, 4096, cuda)
    expected = unpack_mask_reference(packed, 4096)
    busy, stream = torch.cuda.Stream(), torch.cuda.Stream()
    warm(packed, stream)
    with torch.cuda.stream(busy):
        torch.cuda._sleep(2 * A_LONG_TIME)
    with torch.cuda.stream(stream):
        for _ in range(2):
            unpacked = ops.unpack_mask(packed, 4096, backend="cuda")
        stream.synchronize()
        assert not busy.query()
        assert torch.equal(unpacked, expected)
    busy.synchronize()


def test_it_can_be_captured_in_a_graph(kernel, cuda):
    packed = random_packed(64, 512, cuda)
    ops.unpack_mask(packed, 512, backend="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        unpacked = ops.unpack_mask(packed, 512, backend="cuda")
    for _ in range(2):
        packed.copy_(random_packed(64, 512, cuda))
        graph.replay()
        assert torch.equal(unpacked, unpack_mask_reference(packed, 512))


def test_tensors_of_the_cpu_are_refused(cuda):
    packed = ops.pack_mask(torch.ones(2, 8, dtype=torch.bool))
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot run: the tensors are on cpu"):
        ops.unpack_mask(packed, 8, backend="cuda")
