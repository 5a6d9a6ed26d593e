import pytest
import torch
from torch import nn

from dtm_fast import GPTQ, Calibration, Int4, Int8, Prune, SparseGPT
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


@pytest.mark.parametrize(
    ("treatment", "said"),
    [
        (Int4(), f"{UP}: int4(128) needs a K that is a multiple of 128, and K = 32"),
        (GPTQ(24), f"{UP}: gptq(24) needs a K that is a multiple of 24, and K = 32"),
        (Prune("3:5"), f"{UP}: the pattern 3:5 needs rows of a multiple of 5, and K = 32"),
        (SparseGPT("1:12"), f"{UP}: the pattern 1:12 needs rows of a multiple of 12, and K = 32"),
    ],
)
def test_a_treatment_that_does_not_fit_the_components_k_is_refused(decoder, treatment, said):
    with pytest.raises(TreatmentError) as error:
        check_configuration(decoder, {DOWN: Int4(64), UP: treatment})
    assert str(error.value) == said


@pytest.mark.parametrize(
    "treatment", [Prune(0.5, "wanda"), SparseGPT(0.5), GPTQ(16)], ids=lambda each: each.key
)
def test_what_looks_at_inputs_needs_a_calibration_and_says_how_to_give_one(llama, treatment):
    with pytest.raises(TreatmentError) as error:
        check_configuration(Decoder.of(llama), {UP: treatment})
    assert str(error.value) == (
        f"{UP}: {treatment.key} looks at the model's activations: it needs "
        "calibration=Calibration.from_text(model, tokenizer, documents)"
    )
    calibration = Calibration.collect(llama, torch.randint(3, 100, (2, 20)), cache=False)
    check_configuration(Decoder.of(llama, calibration), {UP: treatment})


def test_a_component_that_no_token_reached_has_no_inputs_to_look_at(llama):
    llama.model.layers[0].mlp.unused = nn.Linear(32, 8)
    decoder = Decoder.of(llama, Calibration.collect(llama, torch.randint(3, 100, (2, 20)), cache=False))
    unused = "model.layers.0.mlp.unused"
    check_configuration(decoder, {unused: Int8()})
    with pytest.raises(TreatmentError) as error:
        check_configuration(decoder, {unused: GPTQ(16)})
    said = f"{unused}: gptq(16) looks at its inputs, and no token of the calibration reached it"
    assert str(error.value) == said


def test_json_and_back():
    configuration = {UP: GPTQ(64, damp=0.1), DOWN: Prune("2:4", "wanda")}
    assert configuration_from_json(configuration_to_json(configuration)) == configuration
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
