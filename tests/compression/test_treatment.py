"""What holds of every treatment."""

import pytest
import torch

from dtm_fast import GPTQ, W8A8, Drop, Int4, Int8, LLMInt8, Prune, SparseGPT
from dtm_fast.compression import Treatment
from dtm_fast.errors import TreatmentError
from dtm_fast.model import InputStatistics

N, K = 6, 16
ALL = [
    Int8(),
    W8A8(),
    LLMInt8(),
    Int4(4),
    Int4(None),
    GPTQ(4),
    Prune(0.3),
    Prune(0.3, group="row"),
    Prune("2:4"),
    Prune(0.3, "wanda"),
    Prune("1:2", "wanda"),
    SparseGPT(0.3),
    SparseGPT("4:8"),
    Drop(),
]
OF_INPUTS = [Prune(0.3, "wanda"), Prune("1:2", "wanda"), GPTQ(4), SparseGPT(0.3), SparseGPT("4:8")]

every = pytest.mark.parametrize("treatment", ALL, ids=lambda each: each.key)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def inputs() -> InputStatistics:
    return InputStatistics.of(random(50, K, seed=1))


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_makes_a_new_tensor_of_the_same_kind(treatment, dtype, inputs):
    weight = random(N, K).to(dtype)
    before = weight.clone()
    compressed = treatment.compress(weight, inputs)
    assert (compressed.shape, compressed.dtype) == (weight.shape, dtype)
    assert compressed.data_ptr() != weight.data_ptr()
    assert torch.equal(weight, before)
    assert not torch.equal(compressed, weight)


@every
def test_a_transposed_weight_is_treated_as_its_copy(treatment, inputs):
    weight = random(K, N).t()
    assert torch.equal(treatment.compress(weight, inputs), treatment.compress(weight.contiguous(), inputs))


@every
def test_a_weight_that_trains_is_treated_without_a_gradient(treatment, inputs):
    weight = random(N, K).requires_grad_()
    with torch.no_grad():
        assert torch.equal(treatment.compress(weight, inputs), treatment.compress(weight.detach(), inputs))


@every
def test_rounding_in_bfloat16_comes_last(treatment, inputs):
    weight = random(N, K).bfloat16()
    expected = treatment.compress(weight.float(), inputs).bfloat16()
    assert torch.equal(treatment.compress(weight, inputs), expected)


@every
def test_the_same_bits_come_each_time(treatment, inputs):
    weight = random(N, K)
    assert torch.equal(treatment.compress(weight, inputs), treatment.compress(weight.clone(), inputs))


@every
def test_which_looks_at_the_inputs(treatment, inputs):
    assert treatment.needs_inputs == (treatment in OF_INPUTS)
    assert isinstance(treatment, Treatment)
    if not treatment.needs_inputs:
        weight = random(N, K)
        assert torch.equal(treatment.compress(weight), treatment.compress(weight, inputs))


@pytest.mark.parametrize("treatment", OF_INPUTS, ids=lambda each: each.key)
def test_without_inputs_or_with_others_it_is_refused(treatment):
    with pytest.raises(TreatmentError, match="needs the statistics of the component's inputs"):
        treatment.compress(random(N, K))
    with pytest.raises(TreatmentError, match=r"the inputs have 8 channels, the weight has K = 16"):
        treatment.compress(random(N, K), InputStatistics.of(random(50, 8)))


def test_which_treat_the_input_and_which_are_slow():
    assert [each for each in ALL if each.treats_input] == [W8A8(), LLMInt8()]
    assert [each for each in ALL if each.is_slow] == [GPTQ(4), SparseGPT(0.3), SparseGPT("4:8")]


@pytest.mark.parametrize("treatment", [Int8(), Int4(4), GPTQ(4), SparseGPT(0.3)], ids=lambda each: each.key)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_weight_that_is_not_finite_is_refused(treatment, value, inputs):
    weight = random(N, K)
    weight[2, 3] = value
    with pytest.raises(ValueError, match="weight: expected finite values, got 1 NaN or infinite of 96"):
        treatment.compress(weight, inputs)


@pytest.mark.parametrize(
    ("treatment", "bits"),
    [
        (Int8(), 8 * 96 + 32 * 6),
        (W8A8(), 8 * 96 + 32 * 6),
        (LLMInt8(), 8 * 96 + 32 * 6),
        (Int4(4), 4 * 96 + 20 * 24),
        (Int4(None), 4 * 96 + 20 * 6),
        (GPTQ(8), 4 * 96 + 20 * 12),
        (Prune(0), 16 * 96),  # dense, for a mask would only add to it
        (Prune(0.3), 96 + 16 * 67),  # 28.8 are dropped, so 29
        (Prune(0.3, group="row"), 96 + 16 * 66),  # 4.8 of each row are dropped, so 5
        (Prune(0.3, "wanda"), 96 + 16 * 66),
        (Prune("2:4"), 96 + 16 * 48),
        (Prune("1:4"), 96 + 16 * 24),
        (Prune("3:4", "wanda"), 96 + 16 * 72),
        (SparseGPT(0.3), 96 + 16 * 67),
        (SparseGPT("4:8"), 96 + 16 * 48),
        (Prune(1), 96),
        (Drop(), 0),
    ],
    ids=lambda each: each.key if isinstance(each, Treatment) else str(each),
)
def test_bits_by_hand(treatment, bits):
    assert treatment.bits(N, K) == bits


@pytest.mark.gpu
@every
def test_on_a_gpu_it_makes_the_same(treatment, inputs, cuda):
    weight = random(N, K)
    found = treatment.compress(weight.to(cuda), inputs)
    assert found.device == cuda
    torch.testing.assert_close(found.cpu(), treatment.compress(weight, inputs), rtol=1e-6, atol=0)
