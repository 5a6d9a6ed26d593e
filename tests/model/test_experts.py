import pytest
import tiny

from dtm_fast.model import Decoder


def test_experts_that_are_no_components_are_named_in_a_warning():
    with pytest.warns(
        UserWarning, match="MixtralForCausalLM: .* are no components, first: model.layers.0.mlp.experts"
    ):
        Decoder.of(tiny.with_experts())
