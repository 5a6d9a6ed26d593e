"""Whatever dtype torch makes tensors of by default, measurements are the same to the bit."""

import pytest
import torch
from measurements import assert_same, needs_kernels, some

import dtm_fast as dtm
from dtm_fast.measure import EXTRA_METRICS
from dtm_fast.measure.head import Head


@pytest.fixture(params=[torch.bfloat16, torch.float64])
def other_default(request):
    """A function that sets another default dtype until the test is over."""
    before = torch.get_default_dtype()
    yield lambda: torch.set_default_dtype(request.param)
    torch.set_default_dtype(before)


ENGINES = [pytest.param("fused", marks=needs_kernels), "torch", "differences", "transformers"]


@pytest.mark.parametrize("layers", ENGINES)
def test_measurements_do_not_depend_on_the_default_dtype(
    llama, make_probes, draw_configuration, layers, other_default
):
    probes = make_probes(llama, 5)
    configurations = [{}, *some(dtm.components(llama), draw_configuration, 6)]

    def measured():
        evaluator = dtm.Evaluator(llama, probes, layers=layers)
        found = [
            each
            for metrics in ((), list(EXTRA_METRICS))
            for each in evaluator.measure(configurations, metrics)
        ]
        if evaluator.can_race:
            found += evaluator.rebased(configurations[1]).measure(configurations, ())
            found += evaluator.best(configurations, 2).best
        return found, evaluator.floor

    expected, floor = measured()
    other_default()
    found, its_floor = measured()
    for ours, other in zip(found, expected, strict=True):
        assert_same(ours, other)
    assert its_floor == floor


@pytest.mark.once
def test_what_is_certain_does_not_depend_on_the_default_dtype(other_default):
    draw = torch.Generator().manual_seed(0)
    weight, base = (torch.randn(*shape, generator=draw) for shape in ((60, 12), (3, 2000, 12)))
    hidden = base + 0.3 * torch.randn(3, 2000, 12, generator=draw)
    error = 0.0642  # bfloat16 has 0.06396 and 0.06445
    rows, positions = [0, 1, 2] * 2000, [position for position in range(2000) for _ in range(3)]

    def decided():
        head = Head(weight, base, (base @ weight.T).argmax(-1))
        together = head.decide(hidden, range(3), 0, error)
        at = head.decide_at(hidden[rows, positions], rows, positions, [error] * 6000)
        return [value for each in (together, at) for value in (each.certain, each.lead)]

    expected = decided()
    assert 0 < int(expected[0].sum()) < 6000
    other_default()
    for ours, other in zip(decided(), expected, strict=True):
        assert ours.dtype == other.dtype
        assert torch.equal(ours.nan_to_num(9), other.nan_to_num(9))
