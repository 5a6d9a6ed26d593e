import numpy as np
import pytest
import torch

from dtm_fast.measure import summarize

pytestmark = pytest.mark.once

VALUES = torch.randint(0, 101, (64,), generator=torch.Generator().manual_seed(0))


def test_mean_median_and_p75_are_numpys():
    found = summarize(VALUES)
    assert found.mean == pytest.approx(np.mean(VALUES.numpy()), rel=1e-12)
    assert found.median == np.median(VALUES.numpy())
    assert found.p75 == np.percentile(VALUES.numpy(), 75)


def test_p75_interpolates():
    assert summarize(torch.tensor([0, 10, 20, 40])).p75 == 25


def test_intervals_are_the_same_every_time_and_leave_numpys_own_state_alone():
    np.random.seed(0)
    first = summarize(VALUES)
    np.random.seed(1)
    assert summarize(VALUES) == first


def test_intervals_hold_what_they_are_of():
    found = summarize(VALUES)
    assert found.mean_interval[0] < found.mean < found.mean_interval[1]
    assert found.p75_interval[0] <= found.p75 <= found.p75_interval[1]


def test_the_means_interval_has_the_width_of_the_normal_one():
    values = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    low, high = summarize(values).mean_interval
    assert high - low == pytest.approx(2 * 1.96 * float(values.std()) / 20, rel=0.1)


def test_one_probe_has_an_interval_of_no_width():
    found = summarize(torch.tensor([7]))
    assert found.mean_interval == found.p75_interval == (7, 7)
