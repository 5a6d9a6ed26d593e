import pytest

from dtm_fast import Int8, Prune
from dtm_fast.compression import (
    check_configuration,
    configuration_from_json,
    configuration_identity,
    configuration_to_json,
)
from dtm_fast.errors import ComponentError, TreatmentError
from dtm_fast.model import Decoder

UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"


@pytest.fixture
def decoder(llama) -> Decoder:
    return Decoder.of(llama)


@pytest.mark.parametrize("configuration", [{}, {UP: Int8()}, {UP: Int8(), DOWN: Prune(0.5)}])
def test_what_fits_is_accepted(decoder, configuration):
    check_configuration(decoder, configuration)


def test_an_unknown_component_is_refused(decoder):
    with pytest.raises(ComponentError, match=r"no component 'lm_head'"):
        check_configuration(decoder, {"lm_head": Int8()})


@pytest.mark.parametrize("treatment", ["int8", Int8, None, 8])
def test_what_is_no_treatment_is_refused(decoder, treatment):
    with pytest.raises(TreatmentError, match=rf"{UP}: .* is not a treatment"):
        check_configuration(decoder, {UP: treatment})


@pytest.mark.parametrize("configuration", [None, [UP], UP, Int8()])
def test_what_is_no_mapping_is_refused(decoder, configuration):
    with pytest.raises(TreatmentError, match="a configuration maps components to treatments"):
        check_configuration(decoder, configuration)


def test_json_and_back():
    configuration = {UP: Int8(), DOWN: Prune(0.25)}
    stored = configuration_to_json(configuration)
    assert stored == {DOWN: "prune(0.25)", UP: "int8"}
    assert configuration_from_json(stored) == configuration


def test_the_identity_does_not_depend_on_the_order():
    assert configuration_identity({UP: Int8(), DOWN: Prune(1)}) == configuration_identity(
        {DOWN: Prune(1.0), UP: Int8()}
    )


def test_other_configurations_have_other_identities():
    others = [
        {},
        {UP: Int8()},
        {DOWN: Int8()},
        {UP: Prune(0.5)},
        {UP: Prune(0.25)},
        {UP: Int8(), DOWN: Int8()},
    ]
    assert len({configuration_identity(c) for c in others}) == len(others)
