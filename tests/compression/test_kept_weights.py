"""What a slow treatment made of a component is kept, and is always what it would make anew."""

import pytest
import tiny
import torch
from torch import Tensor

from dtm_fast import GPTQ, Calibration, Int8, Prune, SparseGPT
from dtm_fast.compression import Change, Treatment, compressed_weight
from dtm_fast.compression.kept_weights import KeptWeights
from dtm_fast.errors import TreatmentError
from dtm_fast.model import Decoder, InputStatistics

UP, GATE = "model.layers.1.mlp.up_proj", "model.layers.1.mlp.gate_proj"
TOKENS = torch.randint(3, tiny.VOCABULARY, (3, 20), generator=torch.Generator().manual_seed(1))


class Slow(Treatment):
    """Says how often it was asked."""

    is_slow = True

    def __init__(self, factor: float) -> None:
        self.factor, self.asked = factor, 0

    @property
    def key(self) -> str:
        return f"slow({self.factor})"

    def compress(self, weight: Tensor, inputs: InputStatistics | None = None) -> Tensor:
        self.asked += 1
        return weight * self.factor

    def bits(self, n: int, k: int) -> int:
        return 0


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dtm_fast.compression.kept_weights._KEPT", KeptWeights(2**20))


@pytest.fixture
def decoder(llama) -> Decoder:
    return Decoder.of(llama, Calibration.collect(llama, TOKENS, cache=False))


@pytest.mark.parametrize(
    "treatment", [Int8(), Prune(0.5, "wanda"), GPTQ(16), SparseGPT("2:4")], ids=lambda each: each.key
)
def test_it_is_what_the_treatment_makes_of_the_component(decoder, treatment):
    component = decoder.component(UP)
    expected = treatment.compress(component.weight, component.inputs)
    for _ in range(2):
        assert torch.equal(compressed_weight(component, treatment), expected)


def test_a_slow_treatment_is_asked_once_by_whatever_evaluator(llama, decoder):
    slow = Slow(0.5)
    for each in (decoder, decoder, Decoder.of(llama, Calibration.collect(llama, TOKENS, cache=False))):
        compressed_weight(each.component(UP), slow)
        with Change(each, {UP: slow}):
            pass
    assert slow.asked == 1


def test_another_weight_treatment_or_calibration_is_another_result(llama, decoder):
    slow, other = Slow(0.5), Slow(0.25)
    asked = [(UP, slow), (GATE, slow), (UP, other)]
    found = [compressed_weight(decoder.component(path), each) for path, each in asked]
    assert (slow.asked, other.asked) == (2, 1)
    for (path, each), weight in zip(asked, found, strict=True):
        assert torch.equal(weight, decoder.component(path).weight * each.factor)
    calibrated_otherwise = Decoder.of(llama, Calibration.collect(llama, TOKENS[:2], cache=False))
    compressed_weight(calibrated_otherwise.component(UP), slow)
    compressed_weight(Decoder.of(llama).component(UP), slow)
    assert slow.asked == 4


def test_the_same_bytes_in_another_shape_or_dtype_are_another_weight():
    kept, slow = KeptWeights(2**20), Slow(0.5)
    weight = torch.randn(4, 4)
    for other in (weight, weight.view(2, 8), weight.view(torch.int32), weight):
        assert torch.equal(kept.of(other, slow, None), other * 0.5)
    assert slow.asked == 3


def test_a_weight_that_was_changed_is_another_one(decoder):
    component, slow = decoder.component(UP), Slow(0.5)
    first = compressed_weight(component, slow)
    with torch.no_grad():
        component.parameter.data.mul_(2)  # of which torch takes no note
    assert torch.equal(compressed_weight(component, slow), first * 2)
    with Change(decoder, {UP: Prune(0.5)}):
        expected = component.weight * 0.5
        assert torch.equal(compressed_weight(component, slow), expected)
    assert slow.asked == 3


def test_what_is_returned_is_the_callers_own(decoder):
    component, slow = decoder.component(UP), Slow(0.5)
    expected = component.weight * 0.5
    for _ in range(3):
        found = compressed_weight(component, slow)
        assert torch.equal(found, expected)
        found.fill_(7)
    assert slow.asked == 1


def test_what_was_used_least_recently_goes_first(decoder):
    weight = decoder.component(UP).weight
    a, b, c = treatments = [Slow(factor) for factor in (0.1, 0.2, 0.3)]
    kept = KeptWeights(2 * weight.nbytes)

    def ask(*order: Slow) -> list[int]:
        for each in order:
            assert torch.equal(kept.of(weight, each, None), weight * each.factor)
        return [each.asked for each in treatments]

    assert ask(a, b, a) == [1, 1, 0]
    assert ask(c, a) == [1, 1, 1]  # b goes
    assert ask(b) == [1, 2, 1]  # c goes
    assert ask(a, b) == [1, 2, 1]
    assert ask(c) == [1, 2, 2]


def test_one_larger_than_the_bound_is_kept_until_the_next(decoder):
    weight, a, b = decoder.component(UP).weight, Slow(0.1), Slow(0.2)
    kept = KeptWeights(1)
    for each in (a, a, b, b, a):
        kept.of(weight, each, None)
    assert (a.asked, b.asked) == (2, 1)


def test_a_gram_that_cannot_be_factorized_names_the_component(llama):
    tokens = torch.full((1, 4), 7)  # four tokens for 32 channels, and no damp
    decoder = Decoder.of(llama, Calibration.collect(llama, tokens, cache=False))
    with pytest.raises(TreatmentError) as error:
        compressed_weight(decoder.component(UP), GPTQ(16, damp=0))
    assert str(error.value) == (
        f"{UP}: XᵀX of its inputs over 4 tokens is not positive definite with damp = 0; a larger damp or more tokens "
        "make it so"
    )


@pytest.mark.parametrize("treatment", [Int8(), GPTQ(16)], ids=lambda each: each.key)
def test_a_weight_that_is_not_finite_names_the_component(decoder, treatment):
    decoder.component(UP).parameter.data[3, 4] = torch.nan
    with pytest.raises(TreatmentError, match=rf"^{UP}: weight: expected finite values, got 1 NaN"):
        compressed_weight(decoder.component(UP), treatment)
