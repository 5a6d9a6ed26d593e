"""The CUDA kernels of the linear layers against their twins, each kernel by itself, and what every one promises."""

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dtm_fast import ops
from dtm_fast.ops.int8_linear import int8_linear_cuda, int8_linear_reference
from dtm_fast.ops.mask_bits import unpack_mask_reference
from dtm_fast.ops.masked_linear import masked_linear_cuda

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("native_cuda")]

DTYPES = [torch.float32, torch.bfloat16]
# M, N, K: tails of every kind, and sizes of models.
SHAPES = [
    (1, 1, 1), (1, 4096, 4096), (2, 507, 128), (8, 123, 513), (16, 64, 64), (16, 4096, 11008), (17, 513, 123),
    (33, 65, 4097), (64, 256, 128), (100, 300, 96), (127, 129, 272), (128, 256, 4096), (507, 123, 513),
    (1024, 1536, 576), (1030, 1000, 2064), (2048, 4096, 1024), (300, 11008, 4096),
]  # fmt: skip


def is_hopper() -> bool:
    return torch.cuda.get_device_capability() == (9, 0)


TOKEN_BYTES = 2**17  # of shared memory, for the tokens of few_tokens_stream


def int8_kernels(rows: int, depth: int) -> list[str]:
    """Those that must be able to run."""
    found = ["best", "mma"]
    if rows <= 16 and depth % 16 == 0:
        found.append("few_tokens")
    if is_hopper() and depth % 16 == 0:
        found.append("hopper")
        if rows <= 16 and rows * depth <= TOKEN_BYTES:
            found.append("few_tokens_stream")
    return found


def masked_kernels(rows: int, depth: int, dtype: torch.dtype) -> list[str]:
    """Those that must be able to run."""
    found = ["best", "mma"]
    if dtype == torch.bfloat16 and depth % 8 == 0:
        if rows <= 16:
            found.append("few_tokens")
        if is_hopper() and depth % 64 == 0:  # whole words of mask bits
            found.append("hopper")
        if is_hopper() and depth % 128 == 0 and rows <= 16 and 2 * rows * depth <= TOKEN_BYTES:
            found.append("few_tokens_stream")
    return found


def tokens(rows: int, depth: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    x = torch.randn(rows, depth, device=device)
    x[: rows // 2, : depth // 3] *= 100
    return x.to(dtype)


def int8_inputs(
    rows: int, columns: int, depth: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, ...]:
    qweight = torch.randint(-128, 128, (columns, depth), device=device).to(torch.int8)
    return tokens(rows, depth, dtype, device), qweight, torch.rand(columns, device=device) + 0.01


def bits(x: Tensor) -> Tensor:
    return x.view(torch.int32 if x.dtype == torch.float32 else torch.int16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_int8_linear_gives_the_bits_of_the_twin(cuda, shape, dtype):
    rows, columns, depth = shape
    x, qweight, scale = int8_inputs(*shape, dtype, cuda)
    for bias in (None, torch.randn(columns, device=cuda).to(dtype)):
        expected = int8_linear_reference(x, qweight, scale, bias)
        for kernel in int8_kernels(rows, depth):
            assert torch.equal(int8_linear_cuda(x, qweight, scale, bias, kernel), expected), kernel


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("depth", [*range(1, 34), 4080, 9999, 20000, 131071])
def test_quantization_gives_the_bits_of_the_twin(cuda, depth, dtype):
    x = tokens(9, depth, dtype, cuda)
    x[1] = 0
    x[2, -1], x[3, 0], x[4] = torch.inf, torch.nan, 2.0**-130
    x[5] *= 1e30
    expected = ops.quantize_int8(x[[0, 1, 4, 5, 6, 7, 8]], backend="reference")
    found = ops.quantize_int8(x[[0, 1, 4, 5, 6, 7, 8]], backend="cuda")
    assert all(torch.equal(ours, other) for ours, other in zip(found, expected, strict=True))
    q, scale = ops.quantize_int8.__globals__["quantize_rows"](x, "cuda")
    assert scale[2:4].isnan().all()
    assert not q[1:4].any()


def torchs_error(x: Tensor, weight: Tensor, exact: Tensor) -> float:
    return float((F.linear(x, weight).double() - exact).norm())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_masked_linear_is_as_exact_as_torch(cuda, shape, dtype):
    rows, columns, depth = shape
    x, weight = tokens(*shape[::2], dtype, cuda), torch.randn(columns, depth, device=cuda).to(dtype)
    mask = ops.pack_mask(torch.rand(columns, depth, device=cuda) < 0.5)
    kept = torch.where(unpack_mask_reference(mask, depth), weight, 0)
    exact = F.linear(x.double(), kept.double())
    # A sum in float32, then one rounding: torch's own error, and what another order of summation may add.
    allowed = 1.02 * torchs_error(x, kept, exact) + 2.0**-22 * float(exact.norm())
    for kernel in masked_kernels(rows, depth, dtype):
        found = masked_linear_cuda(x, weight, mask, None, kernel)
        assert float((found.double() - exact).norm()) <= allowed, kernel


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masks", [1, 2, 3, 5, 8, 9])
@pytest.mark.parametrize(
    "shape", [(5, 33, 77), (16, 130, 256), (64, 128, 64), (200, 257, 320), (129, 64, 123)]
)
def test_masked_linear_of_several_masks_to_the_bit(cuda, shape, masks, dtype):
    rows, columns, depth = shape
    x = torch.randint(-1, 2, (rows, depth), device=cuda).to(dtype)
    weight = torch.randint(-1, 2, (columns, depth), device=cuda).to(dtype)
    bias = torch.randint(-3, 4, (columns,), device=cuda).to(dtype)
    kept = torch.rand(masks, columns, depth, device=cuda) < torch.rand(masks, 1, 1, device=cuda)
    kept[0] = True
    weight[:, 0] = torch.nan  # what no mask keeps does not count
    kept[..., 0] = False
    mask = ops.pack_mask(kept)
    expected = torch.stack(
        [F.linear(x.double(), torch.where(each, weight, 0).double(), bias.double()) for each in kept]
    )
    for kernel in masked_kernels(rows, depth, dtype):
        found = masked_linear_cuda(x, weight, mask, bias, kernel)
        assert torch.equal(found, expected.to(dtype)), kernel


@pytest.mark.parametrize("seed", range(40))
def test_random_sizes_and_strides(cuda, seed):
    draw = random.Random(seed)
    rows = draw.choice([draw.randint(1, 16), draw.randint(17, 700)])
    columns, depth = draw.randint(1, 1500), draw.choice([draw.randint(1, 3000), 16 * draw.randint(1, 200)])
    extra = draw.choice([0, 16, draw.randint(1, 40)])
    dtype = draw.choice(DTYPES)
    x = torch.randint(-1, 2, (rows, depth + extra), device=cuda).to(dtype)[:, :depth]
    weight = torch.randint(-1, 2, (columns, depth + extra), device=cuda).to(dtype)[:, :depth]
    kept = torch.rand(columns, depth, device=cuda) < draw.random()
    mask = ops.pack_mask(kept)
    expected = F.linear(x.double(), torch.where(kept, weight, 0).double()).to(dtype)
    kernels = ["best", "mma"] if extra % 16 else masked_kernels(rows, depth, dtype)
    for kernel in kernels:
        assert torch.equal(masked_linear_cuda(x, weight, mask, None, kernel), expected), kernel
    wide, qweight, scale = int8_inputs(rows, columns, depth + extra, dtype, cuda)
    x, qweight = wide[:, :depth], qweight[:, :depth]
    right = int8_linear_reference(x, qweight, scale, None)
    for kernel in ["best", "mma"] if extra % 16 else int8_kernels(rows, depth):
        assert torch.equal(int8_linear_cuda(x, qweight, scale, None, kernel), right), kernel


@pytest.mark.parametrize("kernel", ["few_tokens", "few_tokens_stream", "mma", "hopper"])
def test_a_row_does_not_depend_on_the_others(cuda, kernel):
    if kernel in ("few_tokens_stream", "hopper") and not is_hopper():
        pytest.skip("compute capability 9.0 is needed")
    rows = 16 if kernel.startswith("few_tokens") else 300
    x, weight = tokens(rows, 1024, torch.bfloat16, cuda), torch.randn(512, 1024, device=cuda).bfloat16()
    masks = ops.pack_mask(torch.rand(3, 512, 1024, device=cuda) < 0.5)
    whole = masked_linear_cuda(x, weight, masks, None, kernel)
    for part in (slice(0, 1), slice(3, 12), slice(1, None)):
        assert torch.equal(masked_linear_cuda(x[part], weight, masks, None, kernel), whole[:, part])
    assert torch.equal(masked_linear_cuda(x, weight, masks[1], None, kernel), whole[1])


@pytest.mark.parametrize("shape", [(5, 70, 200), (40, 70, 200), (300, 513, 1040)])
def test_strides_and_addresses_that_are_not_aligned(cuda, shape):
    rows, columns, depth = shape
    wide_x, wide_q = (
        tokens(rows, depth + 7, torch.bfloat16, cuda),
        torch.randint(-127, 128, (columns, depth + 9)),
    )
    wide_q, scale = wide_q.to(torch.int8).to(cuda), torch.rand(columns, device=cuda)
    wide_w = torch.randint(-1, 2, (columns, depth + 5), device=cuda).bfloat16()
    mask = ops.pack_mask(torch.rand(columns, depth, device=cuda) < 0.5)
    shifted_mask = torch.zeros(columns, mask.shape[1] + 3, dtype=torch.uint8, device=cuda)[
        :, 1 : 1 + mask.shape[1]
    ]
    shifted_mask.copy_(mask)
    for offset in (0, 1, 3, 5):
        x, q, w = (each[:, offset : offset + depth] for each in (wide_x, wide_q, wide_w))
        plain = [each.contiguous() for each in (x, q, w)]
        expected = int8_linear_reference(plain[0], plain[1], scale, None)
        for given in (x, x.t().contiguous().t(), plain[0]):
            assert torch.equal(int8_linear_cuda(given, q, scale, None), expected)
        small = torch.randint(-1, 2, (rows, depth), device=cuda).bfloat16()
        right = masked_linear_cuda(small, plain[2], mask, None, "mma")
        assert torch.equal(
            right, F.linear(small, torch.where(unpack_mask_reference(mask, depth), plain[2], 0))
        )
        assert torch.equal(masked_linear_cuda(small, w, shifted_mask, None), right)
    assert torch.equal(int8_linear_cuda(x[:1].expand(rows, depth), q, scale, None)[-1], expected[0])


@pytest.mark.parametrize("shape", [(0, 5, 8), (5, 0, 8), (5, 8, 0), (0, 0, 0)])
def test_nothing_to_do(cuda, shape):
    rows, columns, depth = shape
    x, qweight, scale = int8_inputs(rows, columns, depth, torch.bfloat16, cuda)
    bias = torch.randn(columns, device=cuda).bfloat16()
    y = ops.int8_linear(x, qweight, scale, bias, backend="cuda")
    assert torch.equal(y, bias.expand(rows, columns))
    mask = torch.zeros(columns, -(-depth // 8), dtype=torch.uint8, device=cuda)
    y = ops.masked_linear(x, torch.randn(columns, depth, device=cuda).bfloat16(), mask, bias, backend="cuda")
    assert torch.equal(y, bias.expand(rows, columns))


def operations(device: torch.device) -> dict[str, Callable[[Tensor], Tensor]]:
    """By name, a call on x [M, 1024] bfloat16."""
    _, qweight, scale = int8_inputs(4, 512, 1024, torch.bfloat16, device)
    weight, head = (torch.randn(each, 1024, device=device).bfloat16() for each in (512, 5000))
    masks = ops.pack_mask(torch.rand(2, 512, 1024, device=device) < 0.5)
    bitmap = ops.BitmapWeight.pack(weight, masks[0])
    references: dict[int, Tensor] = {}

    def divergence(x: Tensor) -> Tensor:
        reference = references.setdefault(len(x), torch.arange(len(x), device=device)[None])
        return ops.token_divergence(x[None], head, reference, backend="cuda").nll

    return {
        "int8_linear": lambda x: ops.int8_linear(x, qweight, scale, backend="cuda"),
        "masked_linear": lambda x: ops.masked_linear(x, weight, masks, backend="cuda"),
        "bitmap_linear": lambda x: ops.bitmap_linear(x, bitmap, backend="cuda"),
        "token_divergence": divergence,
    }


@pytest.mark.parametrize("rows", [1, 16, 200])
def test_the_same_bits_every_time(cuda, rows):
    x = tokens(rows, 1024, torch.bfloat16, cuda)
    for name, call in operations(cuda).items():
        first = call(x)
        assert all(torch.equal(call(x), first) for _ in range(20)), name


@pytest.mark.parametrize("rows", [1, 16, 200])
def test_every_operation_can_be_captured_in_a_graph(cuda, rows):
    for name, call in operations(cuda).items():
        x = tokens(rows, 1024, torch.bfloat16, cuda)
        call(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = call(x)
        for _ in range(2):
            x.copy_(tokens(rows, 1024, torch.bfloat16, cuda))
            y.fill_(torch.nan)
            graph.replay()
            assert torch.equal(y, call(x)), name


@pytest.mark.parametrize("kernel", ["few_tokens", "few_tokens_stream"])
@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("width", [256, 2048])
def test_a_call_in_a_graph_reads_what_the_one_before_has_written(cuda, kernel, rows, width):
    """These kernels are launched before the one before has ended: a lost wait would show here and nowhere else."""
    if kernel == "few_tokens_stream" and not is_hopper():
        pytest.skip("compute capability 9.0 is needed")
    weight = (torch.randn(width, width, device=cuda) * (2 / width) ** 0.5).bfloat16()
    mask = ops.pack_mask(torch.rand(width, width, device=cuda) < 0.5)
    qweight, scale = ops.quantize_int8(weight * 0.5**0.5)

    def chain(x: Tensor, after_each: Callable[[], None]) -> list[Tensor]:
        found = [x]
        for _ in range(50):
            found.append(int8_linear_cuda(found[-1], qweight, scale, None, kernel))
            after_each()
            found.append(masked_linear_cuda(found[-1], weight, mask, None, kernel))
            after_each()
        return found[1:]

    x = torch.randn(rows, width, device=cuda).bfloat16()
    chain(x, torch.cuda.synchronize)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = chain(x, lambda: None)
    for _ in range(20):
        # Every time of another x: what the run before has left would be right otherwise.
        x.copy_(torch.randn(rows, width, device=cuda))
        expected = chain(x, torch.cuda.synchronize)
        for each in found:
            each.fill_(torch.nan)
        graph.replay()
        wrong = [
            i
            for i, (ours, right) in enumerate(zip(found, expected, strict=True))
            if not torch.equal(ours, right)
        ]
        assert not wrong


def test_two_streams_at_once(cuda):
    for name, call in operations(cuda).items():
        given = [tokens(rows, 1024, torch.bfloat16, cuda) for rows in (200, 7)]
        expected = [call(x) for x in given]
        streams = [torch.cuda.Stream() for _ in given]
        torch.cuda.synchronize()
        found: list[list[Tensor]] = [[], []]
        for _ in range(10):
            for stream, x, results in zip(streams, given, found, strict=True):
                with torch.cuda.stream(stream):
                    results.append(call(x))
        torch.cuda.synchronize()
        for results, right in zip(found, expected, strict=True):
            assert all(torch.equal(each, right) for each in results), name


def test_two_threads_at_once(cuda):
    """Of sizes for which the same kernel asks for another amount of shared memory."""
    weight = torch.randn(4096, 4096, device=cuda).bfloat16()
    mask = ops.pack_mask(torch.rand(4096, 4096, device=cuda) < 0.5)
    qweight, scale = ops.quantize_int8(weight)
    calls = {
        "int8_linear": lambda x: ops.int8_linear(x, qweight, scale, backend="cuda"),
        "masked_linear": lambda x: ops.masked_linear(x, weight, mask, backend="cuda"),
    }
    for name, call in calls.items():
        given = [tokens(rows, 4096, torch.bfloat16, cuda) for rows in (1, 4)]
        expected = [call(x) for x in given]

        def repeated(x: Tensor, right: Tensor, call: Callable[[Tensor], Tensor] = call) -> bool:
            return all(torch.equal(call(x), right) for _ in range(500))

        with ThreadPoolExecutor(2) as threads:
            assert all(threads.map(repeated, given, expected)), name


def test_it_waits_for_nobody(cuda):
    for name, call in operations(cuda).items():
        x = tokens(16, 1024, torch.bfloat16, cuda)
        expected = call(x)
        late = torch.zeros_like(x)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            call(x)  # what is taken from memory the first time may wait
            torch.cuda.synchronize()
            torch.cuda._sleep(200_000_000)
            late.copy_(x)
            y = call(late)
            assert not stream.query(), name
        stream.synchronize()
        assert torch.equal(y, expected), name


def test_more_than_2_to_the_31_outputs(cuda):
    if torch.cuda.mem_get_info(cuda)[0] < 24 * 2**30:
        pytest.skip("24 GiB of free GPU memory are needed")
    rows, columns, depth = 70_001, 32_771, 64
    x, qweight, scale = int8_inputs(rows, columns, depth, torch.bfloat16, cuda)
    weight = qweight.clamp(-1, 1).bfloat16()
    mask = torch.full((columns, 8), 255, dtype=torch.uint8, device=cuda)
    ends = (slice(0, 100), slice(rows - 100, rows))
    for kernel in int8_kernels(rows, depth):
        y = int8_linear_cuda(x, qweight, scale, None, kernel)
        for part in ends:
            assert torch.equal(y[part], int8_linear_reference(x[part], qweight, scale, None)), kernel
        del y
    for kernel in masked_kernels(rows, depth, torch.bfloat16):
        y = masked_linear_cuda(x, weight, mask, None, kernel)
        for part in ends:
            assert torch.equal(y[part], masked_linear_cuda(x[part], weight, mask, None, kernel)), kernel
        del y


def test_out_of_memory_says_how_much_was_needed(cuda):
    x = torch.zeros(1, device=cuda).bfloat16().expand(2**22, 16)
    weight = torch.zeros(2**20, 16, device=cuda).bfloat16()
    mask = torch.zeros(2**20, 2, dtype=torch.uint8, device=cuda)
    with pytest.raises(torch.cuda.OutOfMemoryError, match=r"Tried to allocate 8192.00 GiB"):
        ops.masked_linear(x, weight, mask, backend="cuda")
    torch.cuda.empty_cache()


def test_bad_arguments_are_named_once_for_every_state_of_a_tensor(cuda):
    x, qweight, scale = int8_inputs(4, 8, 16, torch.bfloat16, cuda)
    ops.int8_linear(x, qweight, scale)
    scale[3] = torch.inf
    with pytest.raises(ValueError, match="scale: expected finite values, got 1 NaN or infinite of 8"):
        ops.int8_linear(x, qweight, scale)
    with pytest.raises(ValueError, match="qweight: expected device cuda:0, that of x, got cpu"):
        ops.int8_linear(x, qweight.cpu(), scale)
    hidden, head = tokens(3, 16, torch.bfloat16, cuda)[None], torch.randn(5, 16, device=cuda).bfloat16()
    with pytest.raises(ValueError, match=r"reference: expected token ids in \[0, 5\), got ids from 0 to 5"):
        ops.token_divergence(hidden, head, torch.tensor([[0, 5, 1]], device=cuda))
