"""sparse_linear under pytest-benchmark: pytest benchmarks --benchmark-enable --benchmark-json out.json."""

from collections.abc import Callable

import pytest

from benchmarks import sparse_linear_cases
from benchmarks.case import Case


@pytest.mark.parametrize("case", sparse_linear_cases.cases(), ids=lambda case: case.name)
def test_sparse_linear(case: Case, run_case: Callable[[Case], None]) -> None:
    run_case(case)
