"""The treatments of a model on a GPU."""

import pytest
import tiny
import torch

import dtm_fast as dtm
from dtm_fast.compression import compressed_weight
from dtm_fast.measure.sensitivity import gradient_sensitivity, layer_error
from dtm_fast.model import Decoder

pytestmark = pytest.mark.gpu

UP = "model.layers.1.mlp.up_proj"
TREATMENTS = [
    "int8",
    "w8a8",
    "llm_int8(1.0)",
    "int4(16)",
    "gptq(16)",
    "prune(0.5)",
    "prune(0.5,row)",
    "prune(2:4)",
    "prune(0.5,wanda)",
    "prune(2:4,wanda)",
    "sparsegpt(0.5)",
    "sparsegpt(2:4)",
    "drop",
]


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(3, tiny.VOCABULARY, (6, 40), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def on_gpu(cuda, tokens):
    model = tiny.model_of("llama").to(cuda)
    return model, dtm.Calibration.collect(model, tokens, cache=False)


def test_a_calibration_is_that_of_the_cpu(on_gpu, tokens):
    """Sums of float32 products in another order."""
    _, ours = on_gpu
    expected = dtm.Calibration.collect(tiny.model_of("llama"), tokens, cache=False)
    for path, inputs in expected.inputs.items():
        assert ours.inputs[path].count == inputs.count
        error = (ours.inputs[path].gram - inputs.gram).norm() / inputs.gram.norm()
        assert float(error) < 1e-5


@pytest.mark.parametrize("key", TREATMENTS)
def test_a_weight_is_compressed_as_on_the_cpu(on_gpu, tokens, key):
    """With the same statistics. GPTQ and SparseGPT go on from rounded values: a tie in one moves those behind it."""
    model, calibration = on_gpu
    treatment = dtm.parse_treatment(key)
    component = Decoder.of(model, calibration).component(UP)
    ours = compressed_weight(component, treatment)
    assert ours.device == component.weight.device
    expected = treatment.compress(component.weight.cpu(), component.inputs)
    same = torch.isclose(ours.cpu(), expected, rtol=1e-5, atol=1e-6).float().mean()
    assert float(same) > (0.97 if key.startswith(("gptq", "sparsegpt")) else 0.9999)


@pytest.mark.parametrize("key", TREATMENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_evaluators_agree(cuda, tokens, make_probes, key, dtype):
    model = tiny.model_of("llama").to(cuda, dtype)
    calibration = dtm.Calibration.collect(model, tokens, cache=False)
    probes = make_probes(model, 5)
    treatment = dtm.parse_treatment(key)
    configurations = [{UP: treatment}, dict.fromkeys(dtm.components(model)[::3], treatment)]
    evaluator = dtm.Evaluator(model, probes, calibration=calibration)
    expected = dtm.ReferenceEvaluator(model, probes, calibration=calibration).measure(configurations)
    for ours, other in zip(evaluator.measure(configurations), expected, strict=True):
        differs = ours.fdt != other.fdt
        earlier = torch.where(ours.fdt < other.fdt, ours.first_margin, other.first_margin)
        assert bool((earlier[differs] <= evaluator.floor.margin).all())


def test_predicted_harm_is_that_of_the_cpu(on_gpu, make_probes):
    model, calibration = on_gpu
    decoder, treatment = Decoder.of(model, calibration), dtm.Int8()
    paths = list(decoder.components)[:5]
    probes = make_probes(model)
    ours = layer_error(decoder, treatment, paths), gradient_sensitivity(decoder, probes, treatment, paths)
    model.to("cpu")
    expected = layer_error(decoder, treatment, paths), gradient_sensitivity(decoder, probes, treatment, paths)
    for one, other in zip(ours, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-3)
