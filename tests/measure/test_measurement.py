import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dtm_fast import Int8, Measurement, Prune
from dtm_fast.errors import InputError, MeasurementError
from dtm_fast.measure import EXTRA_METRICS, summarize

pytestmark = pytest.mark.once

WHERE = {"model.layers.0.mlp.up_proj": Int8(), "model.layers.1.mlp.up_proj": Prune(0.3)}


def measurement_of(rows: list[list[int]], lead: list[list[float]] | None = None, **extra) -> Measurement:
    mismatch = torch.tensor(rows, dtype=torch.bool)
    leads = torch.where(mismatch, -1.0, 1.0) if lead is None else torch.tensor(lead)
    first = mismatch.int().argmax(dim=1, keepdim=True)
    return Measurement.of(WHERE, mismatch, leads.gather(1, first)[:, 0], 0.5, **extra)


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 20).flatmap(
        lambda n: st.lists(st.lists(st.integers(0, 1), min_size=n, max_size=n), min_size=1)
    )
)
def test_fdt_and_sdt_are_the_first_and_the_number_of_divergent_tokens(rows):
    found = measurement_of(rows)
    assert found.fdt.tolist() == [row.index(1) if 1 in row else len(row) for row in rows]
    assert found.sdt.tolist() == [sum(row) for row in rows]


def test_fdt_and_sdt_are_int64():
    found = measurement_of([[0, 1]])
    assert found.fdt.dtype == found.sdt.dtype == torch.int64


def test_the_first_margin_is_by_how_much_the_base_lost_at_the_first_divergence():
    found = measurement_of([[0, 1, 1], [0, 0, 0]], [[2.0, -0.5, -3.0], [1.0, 1.0, 1.0]])
    assert found.first_margin[0] == 0.5
    assert math.isnan(found.first_margin[1])


def test_ties_are_first_divergences_within_the_floor():
    rows = [[1, 0], [1, 0], [1, 0], [0, 0]]
    found = measurement_of(rows, [[-0.0, 1.0], [-0.25, 1.0], [-0.5, 1.0], [1.0, 1.0]])
    assert found.ties(0.0).tolist() == [True, False, False, False]
    assert found.ties(0.25).tolist() == [True, True, False, False]
    assert found.ties(9.0).tolist() == [True, True, True, False]  # a probe that never diverges is no tie


def test_dppl_that_is_too_low_for_the_divergences_is_an_error():
    # Two of four tokens diverge, so log2(DPPL) is at least 1/2; sqrt(2) is just that.
    measurement_of([[1, 0, 1, 0]], dppl=torch.tensor([math.sqrt(2)], dtype=torch.float64))
    with pytest.raises(MeasurementError, match=r"SDT/N exceeds log2\(DPPL\) by 0\.01"):
        measurement_of([[1, 0, 1, 0]], dppl=torch.tensor([2**0.49], dtype=torch.float64))


def test_one_bad_probe_among_good_ones_is_found():
    with pytest.raises(MeasurementError):
        measurement_of([[0, 0], [1, 1]], dppl=torch.tensor([1.0, 1.5], dtype=torch.float64))


def made_up(probes: int = 7, completion: int = 9) -> Measurement:
    draw = torch.Generator().manual_seed(3)
    mismatch = torch.rand(probes, completion, generator=draw) < 0.2
    mismatch[0] = False
    return Measurement.of(
        WHERE,
        mismatch,
        torch.randn(probes, generator=draw),
        1 / 3,
        dppl=4 + torch.rand(probes, generator=draw, dtype=torch.float64),
        perplexity=torch.rand(probes, generator=draw, dtype=torch.float64) / 3,
        agreement=torch.rand(probes, generator=draw, dtype=torch.float64),
        kl=torch.rand(probes, generator=draw, dtype=torch.float64) * 1e-9,
    )


def test_json_and_back_keeps_every_bit():
    made = made_up()
    read = Measurement.from_json(json.loads(json.dumps(made.to_json())))
    assert (read.configuration, read.completion, read.seconds) == (WHERE, 9, 1 / 3)
    for name in ("fdt", "sdt", "first_margin", *EXTRA_METRICS):
        a, b = getattr(made, name), getattr(read, name)
        assert a.dtype == b.dtype
        assert a.numpy().tobytes() == b.numpy().tobytes(), name


def test_json_has_no_nan():
    assert "NaN" not in json.dumps(made_up().to_json(), allow_nan=False)


def test_what_was_not_measured_is_not_in_the_json():
    stored = measurement_of([[0, 1]]).to_json()
    assert not set(EXTRA_METRICS) & set(stored)
    assert Measurement.from_json(stored).dppl is None


def test_a_summary_is_of_the_metrics_values():
    made = made_up()
    for name in ("fdt", "sdt", *EXTRA_METRICS):
        assert made.summary(name) == summarize(getattr(made, name))


def test_what_was_not_measured_has_no_summary():
    with pytest.raises(InputError, match="dppl was not measured; fdt, sdt were"):
        measurement_of([[0, 1]]).summary("dppl")
