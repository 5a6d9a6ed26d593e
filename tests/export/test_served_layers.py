"""How vLLM finds a layer's scheme, on cases worked by hand from its code."""

import pytest
import tiny

from dtm_fast.export.served_layers import (
    FUSED,
    ServedLayer,
    class_matches,
    name_matches,
    served_layers,
    shards_ignored,
)
from dtm_fast.export.skeleton import linear_shapes
from dtm_fast.model import Decoder
from dtm_fast.plan import units

pytestmark = pytest.mark.once

QKV = ServedLayer("l.0.qkv_proj", ("l.0.q_proj", "l.0.k_proj", "l.0.v_proj"))
DOWN = ServedLayer("l.0.down_proj", ("l.0.down_proj",))


def test_what_is_fused_is_what_searches_treat_together(family):
    decoder = Decoder.of(tiny.model_of(family))
    layers = [layer for layer in served_layers(linear_shapes(decoder.model)) if len(layer.shards) > 1]
    assert {frozenset(layer.shards) for layer in layers} == {
        frozenset(unit) for unit in units(decoder, fused=True) if len(unit) > 1
    }


def test_every_module_is_in_one_layer_and_lone_parts_stay_alone():
    paths = ["l.0.q_proj", "l.0.k_proj", "l.0.v_proj", "l.1.q_proj", "l.1.up_proj", "lm_head", "q_proj"]
    layers = served_layers(paths)
    assert layers[0] == QKV
    assert [layer.name for layer in layers[1:]] == ["l.1.q_proj", "l.1.up_proj", "lm_head", "q_proj"]
    assert served_layers([*FUSED["gate_up_proj"]]) == [ServedLayer("gate_up_proj", ("gate_proj", "up_proj"))]


@pytest.mark.parametrize(
    ("name", "target", "expected"),
    [
        ("l.0.q_proj", "l.0.q_proj", True),
        ("l.0.q_proj", "q_proj", False),
        ("l.0.q_proj", "re:.*q_proj", True),
        ("l.0.q_proj", "re:q_proj", False),
        ("l.10.q_proj", "re:l.1", True),
        ("l.0.q_proj", "Linear", False),
    ],
)
def test_names_match_wholly_or_by_a_pattern_from_their_start(name, target, expected):
    assert name_matches(name, target) == expected


@pytest.mark.parametrize(
    ("target", "expected"),
    [("Linear", True), ("linear", True), ("QKVParallelLinear", True), ("Row", False), ("re:.*Linear", True)],
)
def test_classes_match_by_a_part_of_their_name(target, expected):
    assert QKV.class_name == "QKVParallelLinear"
    assert class_matches(QKV.class_name, target) == expected


def test_the_head_is_no_linear():
    head = ServedLayer("lm_head", ("lm_head",))
    assert not class_matches(head.class_name, "Linear")


@pytest.mark.parametrize(
    ("ignore", "expected"),
    [
        ([], []),
        (["l.0.qkv_proj"], [*QKV.shards]),
        (["l.0.k_proj"], ["l.0.k_proj"]),
        (["re:.*[qk]_proj"], ["l.0.q_proj", "l.0.k_proj"]),
        (["Linear"], []),
    ],
)
def test_what_is_ignored(ignore, expected):
    assert shards_ignored(QKV, ignore) == expected
