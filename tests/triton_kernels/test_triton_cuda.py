"""The Triton kernels on a GPU: the cases of the interpreter, all configurations, and what only a GPU can show."""

import pytest
import torch

pytest.importorskip("triton", exc_type=ImportError)
pytest.register_assert_rewrite("kernel_cases")

from kernel_cases import *  # noqa: E402, F403
from kernel_cases import (  # noqa: E402
    DTYPES,
    _seed,  # noqa: F401
    assert_same,
    bitmap_case,
    check_bitmap,
    check_divergence,
    check_int8,
    check_masked,
    check_quantize,
    divergence_case,
    int8_case,
    whole,
)

from dtm_fast.ops.mask_bits import pack_mask_reference, unpack_mask_reference  # noqa: E402
from dtm_fast.ops.quantize_int8 import quantize_rows_reference  # noqa: E402
from dtm_fast.triton_kernels import (  # noqa: E402
    bitmap_linear,
    int8_linear,
    masked_linear,
    quantize_int8,
    token_divergence,
    unpack_mask,
)

pytestmark = pytest.mark.gpu

LARGE = (70_001, 32_771)  # more than 2^31 entries


@pytest.fixture
def device(cuda) -> torch.device:
    return cuda


@pytest.mark.parametrize("config", [*quantize_int8.CONFIGS, None], ids=str)
def test_quantize_int8_in_every_configuration(device, config):
    for shape in ((300, 4608), (77, 1027)):
        for dtype in DTYPES:
            check_quantize((torch.randn(shape) * torch.rand(shape[0], 1)).to(dtype), device, config)


# (M, N, K): rows of 16 bytes that begin at multiples of 16, and none of it
WHOLE_TILES, RAGGED = (512, 768, 1536), (131, 267, 533)


@pytest.mark.parametrize("shape", [WHOLE_TILES, RAGGED, (3, 768, 1536)], ids=str)
@pytest.mark.parametrize("config", [*int8_linear.CONFIGS, None], ids=str)
def test_int8_linear_in_every_configuration(device, config, shape):
    x, qweight, scale, bias = int8_case(*shape)
    check_int8(x, qweight, scale, bias, device, config)
    check_int8(x.bfloat16(), qweight, scale, bias.bfloat16(), device, config)


@pytest.mark.parametrize("shape", [WHOLE_TILES, RAGGED, (3, 768, 1536)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_linear_in_every_configuration(device, dtype, shape):
    rows, columns, depth = shape
    x, weight, bias = (whole(*each, dtype=dtype) for each in ((rows, depth), (columns, depth), (columns,)))
    kept = torch.rand(2, columns, depth) < 0.5
    for config in (*masked_linear.CONFIGS[dtype], None):
        check_masked(x, weight, kept, bias, device, config)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_masked_linear_depends_on_no_other_row_and_no_other_mask(device, dtype):
    x, weight = torch.randn(200, 576).to(device, dtype), torch.randn(300, 576).to(device, dtype)
    mask = pack_mask_reference(torch.rand(3, 300, 576) < 0.5).to(device)
    for config in masked_linear.CONFIGS[dtype]:
        y = masked_linear.masked_linear(x, weight, mask, None, config=config)
        assert torch.equal(
            masked_linear.masked_linear(x[70:75], weight, mask[1], None, config=config), y[1, 70:75]
        )


@pytest.mark.parametrize("config", [*bitmap_linear.CONFIGS, None], ids=str)
def test_bitmap_linear_in_every_configuration(device, config):
    for shape in ((16, 768, 1536), (7, 267, 533)):
        check_bitmap(*bitmap_case(*shape), device, config)


@pytest.mark.parametrize("dtype", DTYPES)
def test_token_divergence_in_every_configuration(device, dtype):
    for shape in ((200, 8448, 576), (130, 1003, 77)):
        case = divergence_case(*shape, dtype)
        for config in (*token_divergence.CONFIGS[dtype], None):
            check_divergence(*case, device, config)


@pytest.mark.parametrize("config", [*unpack_mask.CONFIGS, None], ids=str)
def test_unpack_mask_in_every_configuration(device, config):
    for shape in ((300, 1536), (77, 1027), (1, 100_001)):
        mask = torch.rand(shape) < 0.5
        packed = pack_mask_reference(mask).to(device)
        assert_same(unpack_mask.unpack_mask(packed, shape[1], config=config), mask)


def test_more_than_2_to_the_31_entries(device):
    if torch.cuda.mem_get_info(device)[0] < 24 * 2**30:
        pytest.skip("24 GiB of free GPU memory are needed")
    rows, columns = LARGE
    packed = torch.randint(0, 256, (rows, (columns + 7) // 8), dtype=torch.uint8, device=device)
    packed[:, -1] &= 2 ** (columns % 8) - 1
    unpacked = unpack_mask.unpack_mask(packed, columns)
    for part in (slice(0, 1000), slice(rows - 1000, rows)):
        assert torch.equal(unpacked[part], unpack_mask_reference(packed[part], columns))
    del unpacked
    x = torch.randn(rows, columns, dtype=torch.bfloat16, device=device)
    q, scale = quantize_int8.quantize_rows(x)
    for part in (slice(0, 1000), slice(rows - 1000, rows)):
        expected_q, expected_scale = quantize_rows_reference(x[part].cpu())
        assert_same(q[part], expected_q)
        assert_same(scale[part], expected_scale)


def test_they_can_be_captured_in_a_graph_without_having_been_timed(device):
    """Their last configuration is compiled before; timing would end the capture."""
    x, qweight, scale, bias = (each.to(device) for each in int8_case(40, 272, 528))
    mask = pack_mask_reference(torch.rand(272, 528) < 0.5).to(device)
    hidden, lm_head, reference = (each.to(device) for each in divergence_case(40, 272, 528, torch.float32))

    def run() -> list[torch.Tensor]:
        return [
            int8_linear.int8_linear(x, qweight, scale, bias),
            masked_linear.masked_linear(x, qweight.float(), mask, bias),
            unpack_mask.unpack_mask(mask, 528),
            *quantize_int8.quantize_rows(x),
            *token_divergence.mismatch_and_nll(hidden, lm_head, reference),
        ]

    run()
    for module in (int8_linear, masked_linear, unpack_mask, quantize_int8, token_divergence):
        module._TUNER._fastest.clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for module in (int8_linear, masked_linear, unpack_mask, quantize_int8, token_divergence):
        assert not module._TUNER._fastest
    x.mul_(-2)
    hidden.neg_()
    graph.replay()
    for found, expected in zip(captured, run(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-3)
