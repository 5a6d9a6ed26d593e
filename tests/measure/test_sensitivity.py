import pytest
import torch

import dtm_fast as dtm
from dtm_fast.measure.sensitivity import gradient_sensitivity
from dtm_fast.model import Decoder

pytestmark = pytest.mark.once


def test_gradients_are_made_whatever_the_caller_has_switched_off(llama, make_probes):
    decoder, probes = Decoder.of(llama), make_probes(llama, 2)
    paths = list(decoder.components)[:3]
    expected = gradient_sensitivity(decoder, probes, dtm.Int8(), paths)
    assert all(harm > 0 for harm in expected.values())
    with torch.no_grad():
        assert gradient_sensitivity(decoder, probes, dtm.Int8(), paths) == expected
        assert not torch.is_grad_enabled()
