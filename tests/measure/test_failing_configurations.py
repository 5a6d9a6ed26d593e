"""Configurations under which a model has no finite logits fail by name, and no other with them."""

import pytest
import torch
from measurements import Ruin, needs_kernels

import dtm_fast as dtm
from dtm_fast.compression import Configuration, name_of
from dtm_fast.errors import MeasurementError, NotFiniteError
from dtm_fast.measure import first_pass

UP = "model.layers.1.mlp.up_proj"
DOWN = "model.layers.1.mlp.down_proj"
LATER = "model.layers.2.mlp.up_proj"
# Its input is refused in the middle of a layer, not at the head.
REFUSED: Configuration = {UP: Ruin(), DOWN: dtm.W8A8()}
GOOD: list[Configuration] = [{UP: dtm.Prune(0.5)}, {LATER: dtm.Int8()}, {}]


@pytest.mark.once
@pytest.mark.parametrize("metrics", [(), ("sdt",), ("kl",)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("others", [[], [{**REFUSED, LATER: dtm.Int8()}]], ids=["a chain", "a shared layer"])
def test_a_refused_input_fails_its_configurations_and_no_other(llama, make_probes, metrics, dtype, others):
    model = llama.to(dtype)
    evaluator = dtm.Evaluator(model, make_probes(model))
    finished = []
    with pytest.raises(
        NotFiniteError, match=rf"^{UP} under ruin and 1 more: .* cannot be quantized"
    ) as raised:
        finished.extend(evaluator.iterate([REFUSED, *others, *GOOD], metrics))
    assert {name_of(each.configuration) for each in finished} == set(map(name_of, GOOD))
    assert list(map(name_of, raised.value.configurations)) == list(map(name_of, [REFUSED, *others]))


def test_the_error_names_all_of_them(llama, make_probes):
    bad = [{UP: Ruin()}, {LATER: Ruin()}, {UP: Ruin(), LATER: dtm.Int8()}]
    evaluator = dtm.Evaluator(llama, make_probes(llama))
    with pytest.raises(NotFiniteError, match=r"\(and 2 more configurations failed\)$") as raised:
        list(evaluator.iterate([*bad, *GOOD]))
    assert set(map(name_of, raised.value.configurations)) == set(map(name_of, bad))


@needs_kernels
def test_a_race_is_run_to_its_end_before_it_fails(llama, make_probes):
    evaluator = dtm.Evaluator(llama, make_probes(llama), layers="fused")
    finished = []
    with pytest.raises(NotFiniteError) as raised:
        evaluator.best([{UP: Ruin()}, *GOOD[:2]], 2, on_finished=finished.append)
    assert [each.keys() for each in raised.value.configurations] == [{UP}]
    assert len(finished) == 2


@needs_kernels
def test_what_fails_in_exact_arithmetic_alone_fails_alone(llama, make_probes, monkeypatch):
    candidates = [{path: dtm.Prune(0.3)} for path in dtm.components(llama)]
    evaluator = dtm.Evaluator(llama, make_probes(llama, 9), layers="fused")
    expected = {name_of(m.configuration): m.fdt.tolist() for m in evaluator.measure(candidates, ())}
    settle, doubtful = first_pass.settle, set()

    def failing(layers, head, doubts, *arguments):
        doubtful.update(name_of(each.by_layer[layer]) for each in doubts for layer in each.by_layer)
        if any(LATER in treated for each in doubts for treated in each.by_layer.values()):
            raise NotFiniteError("not finite")
        settle(layers, head, doubts, *arguments)

    # All are in doubt, and so are settled together with others.
    monkeypatch.setattr(first_pass, "error_of", lambda *_: 10.0)
    monkeypatch.setattr(first_pass, "settle", failing)
    finished = []
    with pytest.raises(MeasurementError, match=rf"^{LATER} under prune\(0.3\): not finite$"):
        finished.extend(evaluator.iterate(candidates, ()))
    assert len(doubtful) == len(candidates)
    assert {name_of(m.configuration): m.fdt.tolist() for m in finished} == {
        name: fdt for name, fdt in expected.items() if LATER not in dict(name)
    }
