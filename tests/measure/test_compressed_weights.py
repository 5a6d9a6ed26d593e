"""Compressed weights are packed once, and the ones used last are kept."""

import pytest
import tiny
import torch
from torch import Tensor

import dtm_fast as dtm
from dtm_fast.measure.compressed_weights import CompressedWeights
from dtm_fast.model import Component, Decoder, InputStatistics
from dtm_fast.ops import native
from dtm_fast.ops.layer_weights import Arithmetic, PackedMatrix, has_arithmetic

UP, DOWN = "model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"
INT8, HALF = dtm.Int8(), dtm.Prune(0.5)


@pytest.fixture(params=list(Arithmetic), ids=lambda each: each.name.lower())
def arithmetic(request: pytest.FixtureRequest) -> Arithmetic:
    if not has_arithmetic(request.param):
        pytest.skip(f"{native.cpu_isa()} has no kernel for layers in {request.param.name.lower()}")
    return request.param


@pytest.fixture
def decoder(llama) -> Decoder:
    return Decoder.of(llama)


def assert_packs(packed: PackedMatrix, matrix: Tensor, arithmetic: Arithmetic) -> None:
    assert (packed.N, packed.K, packed.arithmetic) == (*matrix.shape, arithmetic)
    expected = PackedMatrix.pack(matrix, arithmetic)
    assert torch.equal(packed.panels, expected.panels)
    if arithmetic == Arithmetic.FINE_CHANGE:
        assert torch.equal(packed.rest, expected.rest)


def assert_is_the_treated_weight(
    component: Component, treatment: dtm.Treatment, arithmetic: Arithmetic
) -> None:
    weight, change = CompressedWeights().packed(component, treatment, arithmetic)
    compressed = treatment.compress(component.weight).float()
    assert not torch.equal(compressed, component.weight)
    assert_packs(weight, compressed, arithmetic)
    if arithmetic.is_change:
        assert_packs(change, compressed - component.weight.float(), arithmetic)
    else:
        assert change is None


def size_of(component: Component, treatment: dtm.Treatment, arithmetic: Arithmetic) -> int:
    pair = CompressedWeights().packed(component, treatment, arithmetic)
    return sum(each.nbytes for each in pair if each is not None)


class Counted(dtm.Treatment):
    """Says how often it was asked."""

    def __init__(self, name: str) -> None:
        self.name, self.asked = name, 0

    @property
    def key(self) -> str:
        return self.name

    def compress(self, weight: Tensor, inputs: InputStatistics | None = None) -> Tensor:
        self.asked += 1
        return weight / 2

    def bits(self, n: int, k: int) -> int:
        return 0


@pytest.mark.parametrize("treatment", [INT8, HALF], ids=lambda each: each.key)
def test_it_is_what_the_treatment_makes_of_the_weight(decoder, treatment, arithmetic):
    for path in (UP, DOWN):
        assert_is_the_treated_weight(decoder.component(path), treatment, arithmetic)


def test_a_weight_in_bfloat16_is_treated_as_it_is_stored(llama, arithmetic):
    component = Decoder.of(llama.to(torch.bfloat16)).component(UP)
    assert_is_the_treated_weight(component, INT8, arithmetic)


@pytest.mark.parametrize("name", ["attn.c_attn", "mlp.c_fc", "mlp.c_proj"])
def test_a_weight_that_is_stored_transposed_is_packed_with_output_channels_first(name, arithmetic):
    component = Decoder.of(tiny.model_of("gpt2")).component(f"transformer.h.1.{name}")
    assert component.transposed
    assert tuple(component.weight.shape) == tuple(component.parameter.shape)[::-1]
    assert_is_the_treated_weight(component, INT8, arithmetic)


def test_the_second_time_it_is_the_same_object(decoder, arithmetic):
    weights, treatment = CompressedWeights(), Counted("half")
    first = weights.packed(decoder.component(UP), treatment, arithmetic)
    assert weights.packed(decoder.component(UP), treatment, arithmetic) is first
    assert treatment.asked == 1


def test_equal_treatments_are_one(decoder, arithmetic):
    weights = CompressedWeights()
    first = weights.packed(decoder.component(UP), dtm.Prune(0.5), arithmetic)
    assert weights.packed(decoder.component(UP), dtm.Prune(0.50), arithmetic) is first


def test_another_component_treatment_or_arithmetic_is_another_matrix(decoder):
    possible = [each for each in Arithmetic if has_arithmetic(each)]
    if not possible:
        pytest.skip(f"{native.cpu_isa()} has no kernel for layers")
    weights = CompressedWeights()
    asked = [(decoder.component(p), t, a) for p in (UP, DOWN) for t in (INT8, HALF) for a in possible]
    found = [weights.packed(*each) for each in asked]
    assert len({id(each) for each in found}) == len(asked)
    assert all(weights.packed(*each) is known for each, known in zip(asked, found, strict=True))
    for (component, treatment, arithmetic), (weight, _) in zip(asked, found, strict=True):
        assert_packs(weight, treatment.compress(component.weight), arithmetic)


def test_what_was_used_least_recently_goes_first(decoder, arithmetic):
    component = decoder.component(UP)
    a, b, c = treatments = [Counted(name) for name in "abc"]
    weights = CompressedWeights(2 * size_of(component, a, arithmetic))
    a.asked = 0

    def ask(*order: Counted) -> list[int]:
        for each in order:
            weights.packed(component, each, arithmetic)
        return [each.asked for each in treatments]

    assert ask(a, b, a, b) == [1, 1, 0]  # both fit
    assert ask(a, c) == [1, 1, 1]  # b goes
    assert ask(a, c) == [1, 1, 1]
    assert ask(b) == [1, 2, 1]  # a goes
    assert ask(c, b) == [1, 2, 1]
    assert ask(a) == [2, 2, 1]  # c goes
    assert ask(b, a, c) == [2, 2, 2]


def test_one_larger_than_the_bound_is_kept_until_the_next(decoder, arithmetic):
    component, a, b = decoder.component(UP), Counted("a"), Counted("b")
    weights = CompressedWeights(1)
    for each in (a, a, b, b, a):
        weights.packed(component, each, arithmetic)
    assert (a.asked, b.asked) == (2, 1)


def test_only_as_many_go_as_are_in_the_way(decoder, arithmetic):
    small, large = (
        decoder.component(f"model.layers.0.{name}") for name in ("self_attn.k_proj", "mlp.up_proj")
    )
    a, b, c = (Counted(name) for name in "abc")
    room = size_of(large, c, arithmetic) + size_of(small, a, arithmetic)
    assert size_of(small, a, arithmetic) * 2 <= size_of(large, c, arithmetic)
    a.asked = c.asked = 0
    weights = CompressedWeights(room)
    for component, each in ((small, a), (small, b), (large, c), (small, b), (large, c)):
        weights.packed(component, each, arithmetic)
    assert (a.asked, b.asked, c.asked) == (1, 1, 1)
    weights.packed(small, a, arithmetic)
    assert a.asked == 2  # it had gone


def test_the_models_weight_is_not_changed(decoder, arithmetic):
    component = decoder.component(UP)
    before = component.weight.clone()
    CompressedWeights().packed(component, HALF, arithmetic)
    assert torch.equal(component.weight, before)
