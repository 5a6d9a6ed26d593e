"""Layers in parts by torch's operations, what a GPU runs: here on the CPU, beside the reference."""

import subprocess
import sys

import pytest
import tiny
import torch
import torch.nn.functional as F
from measurements import Ruin, assert_same, some
from rounding import assert_within_rounding, rounding_of

import dtm_fast as dtm
from dtm_fast.compression import name_of
from dtm_fast.errors import MeasurementError, ModelError
from dtm_fast.measure import device_rows
from dtm_fast.measure.first_divergence import first_divergence
from dtm_fast.measure.forward import lead
from dtm_fast.measure.racing import fdt75
from dtm_fast.measure.whole_head import WholeHead

pytestmark = pytest.mark.once

UP = "model.layers.1.mlp.up_proj"
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3")
SHARES = [(1.0,), (0.04, 0.1, 0.25, 0.5, 1.0)]


def evaluator_of(model, probes, shares=SHARES[1], **options) -> dtm.Evaluator:
    """In these parts, which are too many to be worth it for so small a model."""
    evaluator = dtm.Evaluator(model, probes, layers="torch", **options)
    evaluator._layers._shares = shares
    return evaluator


@pytest.fixture
def evaluator(llama, make_probes) -> dtm.Evaluator:
    return evaluator_of(llama, make_probes(llama, 9))


@pytest.mark.parametrize(("shares", "metrics"), [(SHARES[0], ()), (SHARES[1], ()), (SHARES[1], ("sdt",))])
@pytest.mark.parametrize("name", FAMILIES)
def test_it_gives_what_the_reference_gives(name, make_probes, draw_configuration, shares, metrics):
    model = tiny.model_of(name)
    probes = make_probes(model, 6, batch_size=4)
    configurations = [{}, *some(dtm.components(model), draw_configuration, 25)]
    evaluator = evaluator_of(model, probes, shares)
    assert evaluator.engine == "layers in parts by torch, float32"
    found = evaluator.measure(configurations, metrics)
    expected = dtm.ReferenceEvaluator(model, probes).measure(configurations)
    for ours, other in zip(found, expected, strict=True):
        assert ours.fdt.tolist() == other.fdt.tolist()
        # Logits of a few units, of sums in float32 over another number of rows, each in an order of its own.
        assert torch.allclose(ours.first_margin, other.first_margin, rtol=1e-5, atol=1e-5, equal_nan=True)
        assert (ours.sdt is None) == (not metrics)
        assert ours.sdt is None or ours.sdt.tolist() == other.sdt.tolist()
    assert len({fdt for other in expected for fdt in other.fdt.tolist()}) > 2  # or equality says little


@pytest.mark.parametrize("shares", SHARES)
@pytest.mark.parametrize("name", FAMILIES)
def test_in_bfloat16_what_differs_from_the_reference_is_rounding(
    name, make_probes, draw_configuration, shares
):
    model = tiny.model_of(name).bfloat16()
    probes = make_probes(model, 6)
    configurations = [{}, *some(dtm.components(model), draw_configuration, 25)]
    evaluator = evaluator_of(model, probes, shares)
    found = evaluator.measure(configurations, ())
    expected = dtm.ReferenceEvaluator(model, probes).measure(configurations)
    assert_within_rounding(found, expected, rounding_of(model, probes))


def test_other_metrics_have_the_bits_of_the_reference(llama, make_probes, draw_configuration):
    probes = make_probes(llama, 5, batch_size=3)
    configurations = [{}, *some(dtm.components(llama), draw_configuration, 6)]
    found = evaluator_of(llama, probes).measure(configurations, ("dppl", "kl"))
    expected = dtm.ReferenceEvaluator(llama, probes).measure(configurations, ("dppl", "kl"))
    for ours, other in zip(found, expected, strict=True):
        assert_same(ours, other)


def test_a_measurement_has_the_same_bits_whatever_else_is_measured(evaluator, draw_configuration):
    configurations = some(list(evaluator.decoder.components), draw_configuration, 12)
    configurations.append(configurations[3])
    together = evaluator.measure(configurations, ())
    backwards = evaluator.measure(configurations[::-1], ())[::-1]
    for one, other, configuration in zip(together, backwards, configurations, strict=True):
        assert one.configuration == configuration
        assert_same(one, other)
        assert_same(one, evaluator.measure([configuration], ())[0])
    for one, configuration in zip(evaluator.measure(configurations), configurations, strict=True):
        assert_same(one, evaluator.measure([configuration])[0])


def test_probes_leave_once_they_diverge(evaluator, monkeypatch):
    layers, head, prefix = evaluator._layers, evaluator._first._head, evaluator.probes.prefix
    read = []
    run = layers.run

    def noted(layer, treatments, x, arithmetic, rows, first=0, end=None, *others, **options):
        read.append((len(rows), first, end))
        return run(layer, treatments, x, arithmetic, rows, first, end, *others, **options)

    monkeypatch.setattr(layers, "run", noted)
    steps = [(layer, {UP: dtm.Prune(0.6)} if layer == 1 else {}) for layer in range(1, layers.depth)]
    found = first_divergence(layers, head, None, steps, layers.exact, prefix, 0.0)
    expected = dtm.ReferenceEvaluator(evaluator.model, evaluator.probes).measure([{UP: dtm.Prune(0.6)}])[0]
    assert found.fdt.tolist() == expected.fdt.tolist()
    parts = read[:: len(steps)]
    assert [first for _, first, _ in parts] == [0] + [end for _, _, end in parts[:-1]]  # nothing twice
    for rows, first, _ in parts[1:]:
        assert rows == int((expected.fdt >= first - prefix + 1).sum()) < 9


def test_the_last_layer_looks_at_what_is_asked_for(evaluator):
    layers, everyone = evaluator._layers, range(9)
    for first, end, wanted in ((0, 19, 7), (0, 12, 3), (0, 19, 0)):
        last = layers.depth - 1
        whole = layers.run(last, {}, None, layers.exact, everyone, first, end)
        some_of_it = layers.run(last, {}, None, layers.exact, everyone, first, end, first_output=wanted)
        # Products over other numbers of rows: float32, in another order of summation.
        assert torch.allclose(whole[:, wanted:], some_of_it[:, wanted:], rtol=2**-20, atol=2**-20)


def test_a_treatment_of_the_input_is_left_to_transformers(evaluator):
    path = "model.layers.0.mlp.down_proj"
    configurations = [{path: dtm.W8A8()}, {path: dtm.W8A8(), UP: dtm.Prune(0.5)}, {UP: dtm.Int8()}]
    expected = dtm.ReferenceEvaluator(evaluator.model, evaluator.probes).measure(configurations)
    for ours, other in zip(evaluator.measure(configurations, ()), expected, strict=True):
        assert ours.fdt.tolist() == other.fdt.tolist()


@pytest.mark.parametrize("k", [1, 4, 30])
@pytest.mark.parametrize("by", ["fdt75", "fdt75+mean"])
def test_the_best_are_those_of_the_exhaustive_sweep(evaluator, k, by):
    candidates = [
        {path: treatment}
        for path in evaluator.decoder.components
        for treatment in (dtm.Int8(), dtm.Prune(0.5))
    ]
    every = evaluator.measure(candidates, ())

    def place(each):
        mean = -each.fdt.double().mean().item() if by == "fdt75+mean" else 0
        return -fdt75(each.fdt), mean, name_of(each.configuration)

    race = evaluator.best(candidates, k, by=by)
    expected = sorted(every, key=place)[:k]
    assert [each.configuration for each in race.best] == [each.configuration for each in expected]
    assert len(race.best) + len(race.dropped) == len(candidates)


@pytest.mark.parametrize("memory", [None, 0])
def test_from_the_states_of_a_configuration_fdt_is_the_same(llama, make_probes, draw_configuration, memory):
    evaluator = evaluator_of(llama, make_probes(llama, 6), memory=memory)
    parent, *others = some(list(evaluator.decoder.components), draw_configuration, 8)
    paths = list(evaluator.decoder.components)
    configurations = [parent, *others, *({**parent, path: dtm.Int8()} for path in paths[::3])]
    expected = evaluator.measure(configurations, ())
    rebased = evaluator.rebased(parent, memory=memory)
    before = rebased.layer_evaluations
    for ours, other in zip(rebased.measure(configurations, ()), expected, strict=True):
        assert ours.fdt.tolist() == other.fdt.tolist()
    assert rebased.layer_evaluations > before
    again = evaluator.rebased(others[0], instead_of=rebased)
    assert again.measure([parent], ())[0].fdt.tolist() == expected[0].fdt.tolist()
    assert rebased.measure([parent], ())[0].fdt.tolist() == expected[0].fdt.tolist()
    with pytest.raises(ValueError, match="instead_of was not made from this evaluator"):
        evaluator.rebased(parent, instead_of=evaluator_of(llama, make_probes(llama, 6)))


def test_a_rebased_evaluator_runs_only_what_differs(evaluator):
    rebased = evaluator.rebased({UP: dtm.Prune(0.5)})
    before = rebased.layer_evaluations
    last = list(evaluator.decoder.components)[-1]
    rebased.measure([{UP: dtm.Prune(0.5), last: dtm.Int8()}], ())
    assert rebased.layer_evaluations - before == 1


def test_a_nan_fails_its_configuration_and_no_other(evaluator):
    good = [{UP: dtm.Int8()}, {UP: dtm.Prune(0.5)}]
    expected = evaluator.measure(good, ())
    finished = []
    with pytest.raises(MeasurementError, match=rf"^{UP} under ruin: .* not finite$"):
        finished.extend(evaluator.iterate([good[0], {UP: Ruin()}, good[1]], ()))
    for one, other in zip(finished, expected, strict=True):
        assert_same(one, other)


def test_what_is_no_layer_of_llamas_kind_is_refused(make_probes):
    model = tiny.model_of("gpt2")
    with pytest.raises(ModelError, match="GPT2Block is no layer that"):
        dtm.Evaluator(model, make_probes(model, 2), layers="torch")


@pytest.mark.once
def test_a_layer_that_adds_nothing_is_no_other_layer(llama, make_probes):
    with torch.no_grad():
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            llama.model.layers[1].get_submodule(name).weight.zero_()
    probes = make_probes(llama, 2)
    found = dtm.Evaluator(llama, probes, layers="torch").measure([{UP: dtm.Int8()}])
    expected = dtm.ReferenceEvaluator(llama, probes).measure([{UP: dtm.Int8()}])
    assert [each.fdt.tolist() for each in found] == [each.fdt.tolist() for each in expected]


def test_float16_is_refused(llama, make_probes):
    model = llama.half()
    with pytest.raises(ModelError, match=r"the model is in torch\.float16"):
        dtm.Evaluator(model, make_probes(model, 2), layers="torch")


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("own", "earlier"), [(5, 0), (1, 0), (3, 4), (1, 6)])
def test_attention_is_causal_from_the_last_position_back(groups, own, earlier):
    torch.manual_seed(0)
    k, v = (torch.randn(2, earlier + own, 3, 8) for _ in range(2))
    q = torch.randn(2, own, 3 * groups, 8)
    found = device_rows.attend(q, k, v, 0.4)
    for position in range(own):
        seen = earlier + position + 1
        for head in range(3 * groups):
            keys, values = k[:, :seen, head // groups], v[:, :seen, head // groups]
            shares = (0.4 * (keys @ q[:, position, head, :, None])).softmax(1)
            # float32 in another order of summation: a softmax and at most eleven terms.
            assert torch.allclose(
                found[:, position, head], (shares * values).sum(1), rtol=2**-20, atol=2**-20
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_whole_head_decides_as_logits_do(dtype):
    torch.manual_seed(0)
    weight, hidden = torch.randn(50, 16).to(dtype), torch.randn(4, 6, 16).to(dtype)
    weight[20] = weight[30]  # logits that are equal
    logits = F.linear(hidden, weight)
    reference = logits.argmax(-1)
    reference[1, 3:] = 7
    reference[2, 1] = 30
    head = WholeHead(weight, hidden, reference)
    rows = [3, 1, 2]
    found = head.decide(hidden[rows, 1:5], rows, 1)
    assert torch.equal(found.mismatch, (logits.argmax(-1) != reference)[rows, 1:5])
    expected = lead(logits[rows, 1:5], reference[rows, 1:5])
    assert torch.equal(found.lead[found.mismatch], expected[found.mismatch])
    assert found.lead[~found.mismatch].isnan().all()
    assert found.certain.all()
    assert head.base_divergence == [
        next((i for i in range(6) if logits[row, i].argmax() != reference[row, i]), 6) for row in range(4)
    ]
    alone = head.decide_at(hidden[rows, 3], rows, [3, 3, 3], [0.0] * 3)
    assert torch.equal(alone.mismatch, found.mismatch[:, 2])
    with pytest.raises(MeasurementError, match="not finite"):
        head.decide(torch.full_like(hidden, torch.inf), range(4), 0)


TRITON = """
import torch
from dtm_fast.measure import device_rows as ours
from dtm_fast.triton_kernels import layer_rows as kernels
torch.manual_seed(0)
for sizes in ((2, 5, 3, 16, 48, 70), (1, 1, 1, 8, 7, 3000), (2, 2, 40, 64, 300, 96), (0, 4, 2, 8, 16, 16)):
    R, T, H, width, D, I = sizes
    x, branch, weight = torch.randn(R, T, D), torch.randn(R, T, D), torch.rand(D)
    q = torch.randn(R, T + 2, 2 * H * width)[:, 2:, : H * width].unflatten(-1, (H, width))
    cosine, sine = torch.randn(T, width), torch.randn(T, width)
    both = torch.randn(R * T, 2 * I).chunk(2, dim=-1)
    for name, given in (("rms_norm", (x, weight, 1e-5)), ("add_norm", (x[:, 1:], branch[:, 1:], weight, 1e-5)),
                        ("rotate", (q, cosine, sine)), ("gated", both)):
        found, expected = getattr(kernels, name)(*given), getattr(ours, name)(*given)
        pairs = zip(found, expected) if name == "add_norm" else [(found, expected)]
        for one, other in pairs:
            # float32: squares summed in another order, and another exp.
            torch.testing.assert_close(one, other, rtol=2e-6, atol=2e-6, msg=name)
    gates, changes = (torch.randn(R * T, 2 * I).chunk(2, dim=-1) for _ in range(2))
    for name, given in (("change_norm", (x, 0.1 * branch, weight, 1e-5)), ("change_gated", (*gates, *changes)),
                        ("change_gated", (*gates, None, changes[1])), ("change_gated", (*gates, changes[0], None))):
        found, expected = getattr(kernels, name)(*given), getattr(ours, name)(*given)
        # The next number of bfloat16 at most, or what float32 loses of values of some units.
        torch.testing.assert_close(found, expected, rtol=2**-7, atol=4e-6, msg=name)
"""


@pytest.mark.process
@pytest.mark.once
def test_tritons_kernels_compute_what_torch_does():
    pytest.importorskip("triton")
    run = subprocess.run(
        [sys.executable, "-c", "import os; os.environ['TRITON_INTERPRET'] = '1'\n" + TRITON],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tritons_kernels_compute_what_torch_does_on_the_gpu(cuda, dtype, monkeypatch):
    torch.manual_seed(0)
    assert device_rows.has_triton(cuda)
    like = {"device": cuda, "dtype": dtype}
    for rows, length, heads, width, hidden, inner in ((2, 5, 3, 16, 48, 70), (7, 33, 32, 128, 4096, 11008)):
        x, branch = torch.randn(rows, length, hidden, **like), torch.randn(rows, length, hidden, **like)
        weight = torch.rand(hidden, **like)
        q = torch.randn(rows, length + 2, 2 * heads * width, **like)[:, 2:, : heads * width]
        angles = torch.randn(2, length, width, **like)
        both = torch.randn(rows * length, 2 * inner, **like).chunk(2, dim=-1)
        calls = {
            "rms_norm": (x, weight, 1e-5),
            "add_norm": (x[:, 1:], branch[:, 1:], weight, 1e-5),
            "rotate": (q.unflatten(-1, (heads, width)), *angles),
            "gated": both,
        }
        if dtype == torch.float32:
            changes = torch.randn(rows * length, 2 * inner, **like).chunk(2, dim=-1)
            calls |= {
                "change_norm": (x, 0.1 * branch, weight, 1e-5),
                "change_gated": (*both, *changes),
            }
        for name, given in calls.items():
            found = getattr(device_rows, name)(*given)
            with monkeypatch.context() as patch:
                patch.setattr(device_rows, "has_triton", lambda device: False)
                expected = getattr(device_rows, name)(*given)
            pairs = zip(found, expected, strict=True) if name == "add_norm" else [(found, expected)]
            for one, other in pairs:
                # Two roundings, each the next number at most.
                step = 2**-7 if one.dtype == torch.bfloat16 else 2e-6
                torch.testing.assert_close(one, other, rtol=2 * step, atol=1e-5)
                # Squares that are added up in another order, or another exp, move few results to their neighbours.
                assert float((one != other).float().mean()) < (0.02 if one.dtype == torch.bfloat16 else 1)
