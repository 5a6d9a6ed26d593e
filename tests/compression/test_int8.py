import pytest
import torch

from dtm_fast import W8A8, Int8, LLMInt8
from dtm_fast.errors import MeasurementError


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_int8_by_hand():
    # Row 0: scale 2; 3 → 1.5 → 2 (half to even), 5 → 2.5 → 2, -7 → -3.5 → -4. Row 1: zeros. Row 2: scale 1.
    weight = torch.tensor([[254.0, 3.0, 5.0, -7.0], [0.0, -0.0, 0.0, 0.0], [-127.0, 0.5, -1.5, 126.6]])
    expected = torch.tensor([[254.0, 4.0, 4.0, -8.0], [0.0, 0.0, 0.0, 0.0], [-127.0, 0.0, -2.0, 127.0]])
    assert torch.equal(Int8().compress(weight), expected)


def test_int8_errs_by_at_most_half_a_step():
    weight = random(40, 57)
    step = weight.abs().amax(1, keepdim=True) / 127
    assert bool(((Int8().compress(weight) - weight).abs() <= step * 0.50001).all())


def test_int8_twice_is_int8_once():
    once = Int8().compress(random(40, 57))
    torch.testing.assert_close(Int8().compress(once), once, rtol=2e-7, atol=0)


def test_w8a8_and_llm_int8_have_the_weights_of_int8():
    weight = random(40, 57)
    for treatment in (W8A8(), LLMInt8(), LLMInt8(0.5)):
        assert torch.equal(treatment.compress(weight), Int8().compress(weight))
        assert treatment != Int8()


def test_w8a8_treats_each_token_with_its_own_scale():
    x = torch.tensor([[[127.0, 0.4]], [[1270.0, 4.0]]])
    assert torch.equal(W8A8().compress_input(x), torch.tensor([[[127.0, 0.0]], [[1270.0, 0.0]]]))


def test_llm_int8_by_hand():
    # 7 stays. Of the others 5.08 is the largest: scale 0.04, -2.51 → -62.75 → -63 → -2.52, 0.01 → 0.25 → 0.
    x = torch.tensor([[7.0, 5.08, -2.51, 0.01]])
    torch.testing.assert_close(LLMInt8().compress_input(x), torch.tensor([[7.0, 5.08, -2.52, 0.0]]))
    # Without an outlier the scale is that of all: 7 / 127, so that 5.08 → 92.2 → 92.
    torch.testing.assert_close(
        LLMInt8(8).compress_input(x), torch.tensor([[7.0, 92 * 7 / 127, -46 * 7 / 127, 0.0]])
    )


def test_an_entry_at_the_threshold_is_an_outlier_of_either_sign():
    x = torch.tensor([6.0, -6.0, 5.999, 127.0, 2.0])
    found = LLMInt8().compress_input(x)
    assert found[[0, 1, 3]].tolist() == [6.0, -6.0, 127.0]
    torch.testing.assert_close(found[[2, 4]], torch.tensor([5.999, 42 * 5.999 / 127]))


def test_a_token_of_outliers_alone_stays_as_it_is():
    x = torch.tensor([[8.0, -9.0, 1e30], [6.0, 0.0, 0.0]])
    assert torch.equal(LLMInt8().compress_input(x), x)


def test_the_product_is_that_of_llm_int8_of_each_token_alone():
    """Outlier channels multiplied as they are, the others in integers: section 3.2, one token at a time."""
    weight, x = random(5, 12), random(3, 12, seed=1) * torch.tensor([[1.0], [4.0], [0.1]])
    found = LLMInt8(3).compress_input(x) @ LLMInt8(3).compress(weight).T
    assert bool((x.abs() >= 3).any())
    for token, row in zip(x, found, strict=True):
        outliers = token.abs() >= 3
        scale = token[~outliers].abs().max() / 127
        q = (token[~outliers] / scale).round()
        weight_scale = weight.abs().amax(1) / 127
        qweight = (weight / weight_scale[:, None]).round()
        product = (qweight[:, ~outliers] @ q) * scale * weight_scale
        product += (qweight[:, outliers] * weight_scale[:, None]) @ token[outliers]
        torch.testing.assert_close(row, product)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("treatment", [W8A8(), LLMInt8(1.5)], ids=lambda each: each.key)
def test_a_row_does_not_depend_on_its_batch(treatment, dtype):
    x = random(4, 5, 33).to(dtype)
    together = treatment.compress_input(x)
    assert together.dtype == dtype
    for i in range(4):
        for j in range(5):
            assert torch.equal(treatment.compress_input(x[i, j]), together[i, j])


@pytest.mark.parametrize("treatment", [W8A8(), LLMInt8()], ids=lambda each: each.key)
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_an_input_that_is_not_finite_ends_the_measurement(treatment, value):
    with pytest.raises(MeasurementError, match="input of a component cannot be quantized"):
        treatment.compress_input(torch.tensor([[1.0, value], [9.0, 1.0]]))
