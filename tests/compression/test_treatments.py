import pytest
import torch

from dtm_fast import W8A8, Int8, Prune, parse_treatment
from dtm_fast.compression import Treatment
from dtm_fast.errors import InputError, MeasurementError, TreatmentError

SPELLED = {
    "int8": Int8(),
    "w8a8": W8A8(),
    "prune(0.5)": Prune(0.5),
    "prune(0.0)": Prune(0),
    "prune(1.0)": Prune(1),
    "prune(0.001)": Prune(1e-3),
}


@pytest.mark.parametrize("key", SPELLED)
def test_a_key_spells_its_treatment(key):
    assert SPELLED[key].key == key
    assert parse_treatment(key) == SPELLED[key]


@pytest.mark.parametrize(
    "text", [" int8 ", "INT8", "int8()", "Prune( 0.5 )", "prune(.5)", "prune(0.5, magnitude)"]
)
def test_other_spellings_are_read_too(text):
    assert parse_treatment(text) == (Int8() if "8" in text else Prune(0.5))


@pytest.mark.parametrize("text", ["", "int9", "prune 0.5", "prune(0.5", "(0.5)", "int8;drop", "prüne(1)"])
def test_an_unknown_treatment_is_answered_with_the_known(text):
    with pytest.raises(TreatmentError, match=r"no treatment .*known: int8, w8a8, prune"):
        parse_treatment(text)


@pytest.mark.parametrize("text", ["prune", "prune()", "prune(half)", "int8(3)", "prune(0.5,magnitude,1)"])
def test_wrong_arguments_are_named(text):
    with pytest.raises(TreatmentError, match="wrong arguments for"):
        parse_treatment(text)


@pytest.mark.parametrize("sparsity", [1.5, -0.1, float("nan"), float("inf"), -1])
def test_a_sparsity_outside_0_to_1_is_refused(sparsity):
    with pytest.raises(TreatmentError, match=r"sparsity must lie in \[0, 1\]"):
        Prune(sparsity)


@pytest.mark.parametrize("sparsity", ["0.5", None, True])
def test_a_sparsity_is_a_number(sparsity):
    with pytest.raises(TreatmentError, match="sparsity must be a number"):
        Prune(sparsity)


def test_a_saliency_must_be_known():
    with pytest.raises(TreatmentError, match="saliency 'wanda' is none of magnitude"):
        parse_treatment("prune(0.5,wanda)")


def test_the_exception_is_a_value_error():
    assert issubclass(TreatmentError, InputError)
    assert issubclass(InputError, ValueError)


def test_int8_by_hand():
    # Row 0: scale 2; 3 → 1.5 → 2 (half to even), 5 → 2.5 → 2, -7 → -3.5 → -4. Row 1: zeros. Row 2: scale 1.
    weight = torch.tensor([[254.0, 3.0, 5.0, -7.0], [0.0, -0.0, 0.0, 0.0], [-127.0, 0.5, -1.5, 126.6]])
    expected = torch.tensor([[254.0, 4.0, 4.0, -8.0], [0.0, 0.0, 0.0, 0.0], [-127.0, 0.0, -2.0, 127.0]])
    assert torch.equal(Int8().compress(weight), expected)


def test_int8_errs_by_at_most_half_a_step():
    weight = torch.randn(40, 57, generator=torch.Generator().manual_seed(0))
    step = weight.abs().amax(1, keepdim=True) / 127
    assert bool(((Int8().compress(weight) - weight).abs() <= step * 0.50001).all())


def test_int8_twice_is_int8_once():
    weight = torch.randn(40, 57, generator=torch.Generator().manual_seed(0))
    once = Int8().compress(weight)
    torch.testing.assert_close(Int8().compress(once), once, rtol=2e-7, atol=0)


def test_prune_by_hand():
    weight = torch.tensor([[1.0, -4.0, 0.5], [-2.0, 3.0, 0.25]])
    assert torch.equal(Prune(0.5).compress(weight), torch.tensor([[0.0, -4.0, 0.0], [-2.0, 3.0, 0.0]]))


def test_prune_at_its_ends():
    weight = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    assert torch.equal(Prune(0).compress(weight), weight)
    assert not Prune(1).compress(weight).any()


@pytest.mark.parametrize("treatment", [Int8(), W8A8(), Prune(0.3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_treatment_makes_a_new_tensor_of_the_same_kind(treatment, dtype):
    weight = torch.randn(6, 10, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = weight.clone()
    compressed = treatment.compress(weight)
    assert (compressed.shape, compressed.dtype) == (weight.shape, dtype)
    assert compressed.data_ptr() != weight.data_ptr()
    assert torch.equal(weight, before)


@pytest.mark.parametrize("treatment", [Int8(), Prune(0.3)])
def test_a_transposed_weight_is_treated_as_its_copy(treatment):
    weight = torch.randn(10, 6, generator=torch.Generator().manual_seed(0)).t()
    assert torch.equal(treatment.compress(weight), treatment.compress(weight.contiguous()))


def test_w8a8_treats_each_token_with_its_own_scale():
    x = torch.tensor([[[127.0, 0.4]], [[1270.0, 4.0]]])
    assert torch.equal(W8A8().compress_input(x), torch.tensor([[[127.0, 0.0]], [[1270.0, 0.0]]]))


def test_only_w8a8_treats_the_input():
    assert [t.treats_input for t in (Int8(), Prune(0.5), W8A8())] == [False, False, True]


def test_an_input_that_is_not_finite_ends_the_measurement():
    with pytest.raises(MeasurementError, match="input of a component cannot be quantized"):
        W8A8().compress_input(torch.tensor([[1.0, torch.inf]]))


def test_w8a8_is_not_int8():
    assert W8A8() != Int8()
    assert isinstance(W8A8(), Treatment)
