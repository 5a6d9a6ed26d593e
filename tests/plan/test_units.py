import pytest
import tiny

from dtm_fast.model import Decoder
from dtm_fast.plan.units import units


def last_names(family: str, fused: bool) -> list[tuple[str, ...]]:
    """The names of the first layer's units."""
    found = units(Decoder.of(tiny.model_of(family)), fused)
    return [tuple(path.rpartition(".")[2] for path in unit) for unit in found[: len(found) // tiny.LAYERS]]


@pytest.mark.parametrize("fused", [False, True])
def test_every_component_is_in_one_unit_in_depth_order(family, fused):
    decoder = Decoder.of(tiny.model_of(family))
    found = units(decoder, fused)
    assert sorted(path for unit in found for path in unit) == sorted(decoder.components)
    order = list(decoder.components)
    for unit in found:
        assert list(unit) == sorted(unit, key=order.index)
        assert len({decoder.component(path).layer for path in unit}) == 1
    firsts = [unit[0] for unit in found]
    assert firsts == sorted(firsts, key=order.index)


def test_by_default_every_component_is_a_unit(family):
    decoder = Decoder.of(tiny.model_of(family))
    assert units(decoder) == [(path,) for path in decoder.components]


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma2"])
def test_query_key_and_value_are_together_and_so_are_gate_and_up(family):
    assert last_names(family, fused=True) == [
        ("q_proj", "k_proj", "v_proj"),
        ("o_proj",),
        ("gate_proj", "up_proj"),
        ("down_proj",),
    ]


def test_they_are_together_in_whatever_order_the_model_has_them():
    assert last_names("opt", fused=True) == [
        ("k_proj", "v_proj", "q_proj"),
        ("out_proj",),
        ("fc1",),
        ("fc2",),
    ]


@pytest.mark.parametrize("family", ["phi3", "gpt2", "gpt_neox"])
def test_what_the_model_holds_as_one_matrix_and_unknown_names_stay_single(family):
    assert last_names(family, fused=True) == last_names(family, fused=False)


def test_only_parts_of_one_module_are_together():
    decoder = Decoder.of(tiny.model_of("llama"))
    for unit in units(decoder, fused=True):
        assert len({path.rpartition(".")[0] for path in unit}) == 1
