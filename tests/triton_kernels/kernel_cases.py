"""What every Triton kernel must give, on a GPU (test_triton_cuda.py) or interpreted (test_interpreted.py).

Both give the fixture ``device``. Where sums are compared to the bit, values are small whole numbers: every order of
summation is then exact.
"""

import pytest
import torch
from torch import Tensor

from dtm_fast.ops.bitmap_weight import BitmapWeight
from dtm_fast.ops.int8_linear import int8_linear_reference
from dtm_fast.ops.mask_bits import pack_mask_reference, unpack_mask_reference
from dtm_fast.ops.quantize_int8 import quantize_rows_reference
from dtm_fast.triton_kernels import (
    bitmap_linear,
    int8_linear,
    masked_linear,
    quantize_int8,
    token_divergence,
    unpack_mask,
)

DTYPES = [torch.float32, torch.bfloat16]
# (M, N, K)
SHAPES = [(37, 45, 130), (1, 33, 64), (17, 1, 300), (1, 1, 1), (0, 5, 8), (5, 0, 8), (5, 8, 0)]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def whole(*shape: int, dtype: torch.dtype = torch.float32, most: int = 3) -> Tensor:
    return torch.randint(-most, most + 1, shape).to(dtype)


def assert_same(found: Tensor, expected: Tensor) -> None:
    """The same bits, but that any NaN equals any other."""
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=0, equal_nan=True)


def in_columns(x: Tensor) -> Tensor:
    """The same values, but neither rows nor columns are contiguous."""
    wider = torch.zeros((*x.shape[:-1], 2 * x.shape[-1] + 3), dtype=x.dtype, device=x.device)
    view = wider[..., 3::2]
    view.copy_(x)
    return view


def in_rows(x: Tensor) -> Tensor:
    """The same values in contiguous columns, with an odd stride between rows that begin anywhere."""
    wider = torch.zeros((*x.shape[:-1], x.shape[-1] + 3), dtype=x.dtype, device=x.device)
    view = wider[..., 1:-2]
    view.copy_(x)
    return view


LAYOUTS = [in_columns, in_rows]


def check_quantize(x: Tensor, device: torch.device, config=quantize_int8.CONFIGS[-1]) -> None:
    q, scale = quantize_int8.quantize_rows(x.to(device), config=config)
    expected_q, expected_scale = quantize_rows_reference(x)
    assert_same(q, expected_q)
    assert_same(scale, expected_scale)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("shape", [(37, 123), (3, 513), (1, 1), (9,), (2, 3, 40), (0, 7), (7, 0)])
def test_quantize_int8(device, dtype, shape):
    check_quantize((torch.randn(shape) * torch.rand(*shape[:-1], 1) * 30).to(dtype), device)


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_int8_near_halves_and_at_the_ends_of_the_range(device, dtype):
    absmax = torch.rand(60, 1) + 0.5
    x = (torch.randint(-127, 127, (60, 150)) + 0.5) * (absmax / 127)
    x = torch.where(torch.rand(x.shape) < 0.5, torch.nextafter(x, 2 * x), x)
    x[:, 77:78] = absmax
    x[0], x[1] = 0, torch.arange(150) * 2.0**-149  # denormal numbers, whose scale is one or two units
    x[2], x[3] = x[2] * 2.0**-130, x[3] * 2.0**120
    x[4] = 2.0**-149  # too small for a scale
    x[5, 3], x[6, 149], x[7, 0] = torch.nan, torch.inf, -torch.inf
    x[8, 5], x[8, 6] = torch.inf, torch.nan
    check_quantize(x.to(dtype), device)


def test_quantize_int8_of_views(device):
    x = torch.randn(11, 70)
    for layout in LAYOUTS:
        check_quantize(layout(x), device)
    check_quantize(x.T, device)
    check_quantize(x, device, config=None)


def check_int8(x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None, device, config=None) -> None:
    moved = (x.to(device), qweight.to(device), scale.to(device), None if bias is None else bias.to(device))
    found = int8_linear.int8_linear(*moved, config=config)
    assert_same(found, int8_linear_reference(x, qweight, scale, bias))


def int8_case(rows: int, columns: int, depth: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    qweight = torch.randint(-128, 128, (columns, depth)).to(torch.int8)
    return torch.randn(rows, depth), qweight, torch.rand(columns) + 0.01, torch.randn(columns)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_int8_linear(device, dtype, shape):
    x, qweight, scale, bias = int8_case(*shape)
    for given in (None, bias) if dtype == torch.float32 else (bias.to(dtype),):
        check_int8(x.to(dtype), qweight, scale, given, device, int8_linear.CONFIGS[-1])


def test_int8_linear_at_the_ends_of_the_range(device):
    x = torch.where(torch.rand(3, 5000) < 0.5, -3.0, 3.0)  # quantizes to ±127
    qweight = torch.where(torch.rand(4, 5000) < 0.5, -128, 127).to(torch.int8)
    x[0], qweight[0], qweight[1] = 3.0, -128, 127
    check_int8(x, qweight, torch.ones(4), None, device, int8_linear.CONFIGS[-1])


def test_int8_linear_gives_rows_of_nan_and_takes_views(device):
    x, qweight, scale, bias = int8_case(6, 20, 40)
    for layout in LAYOUTS:
        check_int8(layout(x), layout(qweight), layout(scale[None])[0], layout(bias[None])[0], device)
    x[1, 3], x[2, 5] = torch.nan, torch.inf
    check_int8(x.reshape(2, 3, 40), qweight, scale, bias, device)
    check_int8(x[0], qweight, scale, bias, device)


def masked_truth(x: Tensor, weight: Tensor, kept: Tensor, bias: Tensor | None) -> Tensor:
    y = x.double() @ torch.where(kept, weight, 0).double().mT
    return y if bias is None else y + bias.double()


def check_masked(x, weight, kept, bias, device, config=None) -> None:
    mask = pack_mask_reference(kept)
    moved = (x.to(device), weight.to(device), mask.to(device), None if bias is None else bias.to(device))
    found = masked_linear.masked_linear(*moved, config=config)
    truth = [masked_truth(x, weight, each, bias) for each in (kept if kept.dim() == 3 else kept[None])]
    expected = truth[0] if kept.dim() == 2 else torch.stack(truth)
    assert_same(found, expected.to(x.dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_masked_linear(device, dtype, shape):
    rows, columns, depth = shape
    x, weight, bias = whole(rows, depth, dtype=dtype), whole(columns, depth, dtype=dtype), whole(columns)
    config = masked_linear.CONFIGS[dtype][-1]
    check_masked(x, weight, torch.rand(columns, depth) < 0.5, None, device, config)
    check_masked(x, weight, torch.rand(3, columns, depth) < 0.5, bias.to(dtype), device, config)


@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_linear_of_floats(device, dtype):
    x, weight, kept = (
        torch.randn(20, 200).to(dtype),
        torch.randn(40, 200).to(dtype),
        torch.rand(40, 200) < 0.5,
    )
    found = masked_linear.masked_linear(
        x.to(device), weight.to(device), pack_mask_reference(kept).to(device), None
    )
    truth = masked_truth(x, weight, kept, None)
    allowed = 2**-20 * masked_truth(x.abs(), weight.abs(), kept, None)
    if dtype == torch.bfloat16:
        allowed += 2**-8 * truth.abs()
    assert bool(((found.cpu().double() - truth).abs() <= allowed).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_linear_with_nan_and_infinity(device, dtype):
    x, weight = whole(4, 70, dtype=dtype), whole(9, 70, dtype=dtype)
    kept = torch.rand(9, 70) < 0.5
    weight[~kept] = torch.nan  # does not count
    kept[3, 5], kept[4, 6], kept[:, 7] = True, True, False
    weight[3, 5], weight[4, 6], x[:, 6] = torch.nan, torch.inf, 1
    weight[:, 7], x[2, 7] = 1, torch.nan  # spreads, as in the dense product
    check_masked(x, weight, kept, None, device)


def test_masked_linear_of_views(device):
    x, weight, bias = whole(2, 3, 77), whole(20, 77), whole(20)
    kept = torch.rand(4, 20, 77) < 0.5
    mask = pack_mask_reference(kept)
    expected = torch.stack([masked_truth(x, weight, each, bias) for each in kept]).float()
    for layout in LAYOUTS:
        moved = [layout(each.to(device)) for each in (x, weight, mask)]
        assert_same(masked_linear.masked_linear(*moved, layout(bias.to(device)[None])[0]), expected)
    moved = [each.to(device) for each in (x, weight, mask, bias)]
    assert_same(masked_linear.masked_linear(*moved[:2], moved[2][::2], moved[3]), expected[::2])
    nothing = masked_linear.masked_linear(*moved[:2], moved[2][:0], None)
    assert nothing.shape == (0, 2, 3, 20)


def check_bitmap(x: Tensor, weight: Tensor, bias: Tensor | None, device, config=None) -> None:
    packed = BitmapWeight.pack(weight)
    parts = (each.to(device) for each in (packed.bits, packed.begins, packed.values))
    moved = BitmapWeight(*parts, packed.N, packed.K)
    found = bitmap_linear.bitmap_linear(
        x.to(device), moved, None if bias is None else bias.to(device), config=config
    )
    assert_same(found, masked_truth(x, weight, weight != 0, bias).bfloat16())


def bitmap_case(rows: int, columns: int, depth: int) -> tuple[Tensor, Tensor, Tensor]:
    kept = torch.rand(columns, depth) < torch.rand(columns, 1)  # from empty rows to full ones
    weight = whole(columns, depth, dtype=torch.bfloat16) * kept
    return whole(rows, depth, dtype=torch.bfloat16), weight, whole(columns, dtype=torch.bfloat16)


@pytest.mark.parametrize("shape", [(5, 37, 300), (1, 16, 128), (16, 1, 1), (0, 5, 8), (5, 0, 8), (5, 8, 0)])
def test_bitmap_linear(device, shape):
    x, weight, bias = bitmap_case(*shape)
    check_bitmap(x, weight, None, device)
    check_bitmap(x, weight, bias, device, bitmap_linear.CONFIGS[-1])


def test_bitmap_linear_of_views(device):
    x, weight, bias = bitmap_case(6, 20, 70)
    for layout in LAYOUTS:
        check_bitmap(layout(x).reshape(2, 3, 70), weight, layout(bias[None])[0], device)


@pytest.mark.parametrize(
    "shape", [(37, 123), (3, 513), (1, 1), (4, 8), (2, 7), (17,), (2, 3, 33), (0, 9), (9, 0)]
)
def test_unpack_mask(device, shape):
    mask = torch.rand(shape) < 0.5
    packed = pack_mask_reference(mask).to(device)
    for config in (unpack_mask.CONFIGS[-1], None):
        found = unpack_mask.unpack_mask(packed, shape[-1], config=config)
        assert found.dtype == torch.bool
        # torch takes any byte but 0 for True: the bytes themselves must be 0 and 1.
        assert_same(found.view(torch.uint8), mask.view(torch.uint8))


def test_unpack_mask_of_views(device):
    packed = pack_mask_reference(torch.rand(11, 300) < 0.5)
    expected = unpack_mask_reference(packed, 300)
    for layout in LAYOUTS:
        assert_same(unpack_mask.unpack_mask(layout(packed.to(device)), 300), expected)
    assert_same(unpack_mask.unpack_mask(packed.to(device)[3::2], 300), expected[3::2])


def logits_of(hidden: Tensor, lm_head: Tensor) -> Tensor:
    """As a model that stores them would see them."""
    return (hidden.double() @ lm_head.double().T).float().to(hidden.dtype).double()


def check_divergence(hidden: Tensor, lm_head: Tensor, reference: Tensor, device, config=None) -> None:
    """Exact tokens; nll within 2^-20 of the largest term, where exp and log are approximations of 22 bits."""
    moved = (hidden.to(device), lm_head.to(device), reference.to(device))
    mismatch, nll = (each.cpu() for each in token_divergence.mismatch_and_nll(*moved, config=config))
    logits = logits_of(hidden, lm_head)
    assert (mismatch.dtype, nll.dtype) == (torch.bool, torch.float32)
    assert torch.equal(mismatch, logits.argmax(-1) != reference)
    truth = logits.logsumexp(-1) - logits.gather(-1, reference[:, None])[:, 0]
    largest = logits.abs().amax(-1) if len(lm_head) else truth
    close = (nll.double() - truth).abs() <= 2**-20 * (1 + largest + truth.abs())
    assert bool((close | (nll == truth) | (nll.isnan() & truth.isnan())).all())


def divergence_case(
    rows: int, vocabulary: int, depth: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Many logits are equal, and the reference is right at most positions."""
    hidden, lm_head = whole(rows, depth, dtype=dtype), whole(vocabulary, depth, dtype=dtype)
    reference = logits_of(hidden, lm_head).argmax(-1)
    reference[::3] = torch.randint(0, vocabulary, reference[::3].shape)
    return hidden, lm_head, reference


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(37, 300, 70), (1, 1, 1), (3, 128, 16), (18, 129, 33), (4, 7, 0)])
def test_token_divergence(device, dtype, shape):
    check_divergence(*divergence_case(*shape, dtype), device, token_divergence.CONFIGS[dtype][-1])


def test_token_divergence_of_many_tiles(device):
    check_divergence(*divergence_case(5, 8400, 3, torch.float32), device)


@pytest.mark.parametrize("dtype", DTYPES)
def test_token_divergence_of_no_tokens_and_of_fractions(device, dtype):
    empty = torch.zeros(0, 5).to(dtype), torch.zeros(9, 5).to(dtype), torch.zeros(0, dtype=torch.int64)
    check_divergence(*empty, device)
    # Eighths of small whole numbers: sums of a few products are exact, and so are the tokens.
    hidden, lm_head = whole(9, 4, most=15) / 8, whole(400, 4, most=15) / 8
    check_divergence(hidden.to(dtype), lm_head.to(dtype), torch.randint(0, 400, (9,)), device)


@pytest.mark.parametrize("dtype", DTYPES)
def test_token_divergence_rounds_logits_to_the_dtype_and_takes_the_lowest_of_equal_ones(device, dtype):
    # 256 and 257 are one number in bfloat16; 0 and -0 are equal.
    lm_head = torch.zeros(300, 2)
    lm_head[7], lm_head[200] = torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])
    hidden = torch.tensor([[256.0, 1.0], [-1.0, 0.0], [-0.0, -0.0]]).to(dtype)
    for token in (0, 7, 8, 200):
        check_divergence(hidden, lm_head.to(dtype), torch.full((3,), token), device)


def test_token_divergence_with_nan_and_infinity(device):
    # With one column, a row of lm_head is the logit of a token for the hidden state 1.
    special = {
        "nan": {130: torch.nan, 5: torch.inf},
        "negative nan": {3: -torch.nan, 290: torch.inf},
        "two nan": {140: torch.nan, 20: torch.nan},
        "infinity": {150: torch.inf},
        "two infinities": {150: torch.inf, 10: torch.inf},
        "minus infinity": {0: -torch.inf},
    }
    for values in special.values():
        lm_head = whole(300, 1)
        for token, value in values.items():
            lm_head[token] = value
        for token in {5, *values}:
            check_divergence(torch.ones(1, 1), lm_head, torch.tensor([token]), device)
    nothing = torch.full((300, 1), -torch.inf)
    check_divergence(torch.ones(1, 1), nothing, torch.tensor([0]), device)
    nothing[200] = -1e5  # after tiles of minus infinities
    check_divergence(torch.ones(1, 1), nothing, torch.tensor([200]), device)


def test_token_divergence_of_views(device):
    hidden, lm_head, reference = divergence_case(20, 300, 33, torch.float32)
    for layout in LAYOUTS:
        moved = (layout(hidden.to(device)), layout(lm_head.to(device)), layout(reference.to(device)[None])[0])
        mismatch, _ = token_divergence.mismatch_and_nll(*moved)
        assert_same(mismatch, logits_of(hidden, lm_head).argmax(-1) != reference)
