"""The study of rounding: what a placebo is, and how rankings are compared."""

import json

import pytest
import torch

from benchmarks.rounding import PAGE, ROUNDING, Placebo, rank_correlation, ranks, section


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_placebo_makes_the_largest_entry_the_next_number(dtype, sign):
    weight = sign * torch.tensor([[1.0, -2.0, 0.5], [3.0, 2.5, 0.0]], dtype=dtype)
    found = Placebo().compress(weight)
    expected = weight.clone()
    expected[1, 0] += sign * 2 * torch.finfo(dtype).eps  # between 2 and 4 numbers are 2 eps apart
    assert torch.equal(found, expected)
    assert int((found != weight).sum()) == 1


def test_equal_values_share_their_places():
    assert ranks(torch.tensor([3.0, 1.0, 3.0, 2.0])).tolist() == [3.5, 1.0, 3.5, 2.0]
    assert rank_correlation(torch.tensor([1.0, 2.0, 9.0]), torch.tensor([5.0, 6.0, 7.0])) == pytest.approx(1)
    assert rank_correlation(torch.tensor([1.0, 2.0]), torch.tensor([7.0, 5.0])) == pytest.approx(-1)
    assert rank_correlation(torch.tensor([1.0, 1.0]), torch.tensor([7.0, 5.0])) is None


def test_what_has_no_correlation_is_left_out_of_the_table():
    row = {"fdt": 61.5, "never_diverge": 0.94, "halves": None}
    dtype = {
        "floor": {"fdt": 64.0},
        "components": 70,
        "treatments": dict.fromkeys(("placebo", "int8", "prune(0.25)"), row),
    }
    machine = {"cpu_model": "a CPU", "torch": "2", "date": "today", "git_sha": "abc"}
    report = {"machine": machine, "length": 64, "probes": 32, "dtypes": {"float32": dtype}}
    text = section(report | {"between": {"placebo": None, "int8": 0.5}}, "x.json")
    assert "| float32 | 64.0 | 61.5 | 61.5 | 94% |  | 61.5 | 94% |  |" in text
    assert "between the dtypes: int8 0.50." in text


def test_the_committed_page_has_the_committed_figures():
    (file,) = (PAGE.parent.parent / "benchmarks" / "results").glob("*-rounding.json")
    page = PAGE.read_text()
    assert ROUNDING.put(page, section(json.loads(file.read_text()), file.name)) == page
