"""A race on probes that the base does not write itself, and what is known more than once."""

import pytest
from measurements import needs_kernels

import dtm_fast as dtm
from dtm_fast.compression import Change, name_of
from dtm_fast.measure.racing import Dropped, fdt75
from dtm_fast.model import Decoder

THE_WRITER = {"model.layers.0.mlp.up_proj": dtm.Prune(0.5)}


@pytest.fixture(params=[pytest.param("fused", marks=needs_kernels), "torch"])
def evaluator(request, llama, make_probes) -> dtm.Evaluator:
    """Of probes written by a configuration: the base diverges, as it may where it wrote them in other arithmetic."""
    with Change(Decoder.of(llama), THE_WRITER):
        probes = make_probes(llama, 9)
    return dtm.Evaluator(llama, probes, layers=request.param)


@pytest.mark.parametrize("by", ["fdt75", "fdt75+mean"])
@pytest.mark.parametrize("k", [1, 3])
def test_the_base_stands_where_it_was_measured(evaluator, by, k):
    candidates = [
        {},
        *({path: each} for path in evaluator.decoder.components for each in (dtm.Int8(), dtm.Prune(0.5))),
    ]
    every = evaluator.measure(candidates, ())
    assert fdt75(every[0].fdt) < evaluator.probes.completion

    def place(each):
        mean = -each.fdt.double().mean().item() if by == "fdt75+mean" else 0
        return -fdt75(each.fdt), mean, name_of(each.configuration)

    expected = [each.configuration for each in sorted(every, key=place)[:k]]
    race = evaluator.best(candidates, k, by=by)
    assert [each.configuration for each in race.best] == expected
    assert expected[0] == THE_WRITER
    for dropped in race.dropped:
        (measured,) = (each for each in every if each.configuration == dropped.configuration)
        assert dropped.highest >= fdt75(measured.fdt)


def test_what_is_known_twice_counts_once(evaluator):
    candidates = [{path: dtm.Int8()} for path in evaluator.decoder.components]
    once = evaluator.best(candidates, 3)
    twice = [*once.dropped, *once.best, *once.best, *once.dropped]
    before = evaluator.layer_evaluations
    again = evaluator.best(candidates, 3, known=twice)
    assert evaluator.layer_evaluations == before
    assert [each.configuration for each in again.best] == [each.configuration for each in once.best]
    assert len(again.best) + len(again.dropped) == len(candidates)
    assert all(isinstance(each, Dropped) for each in again.dropped)
