"""token_divergence under pytest-benchmark: pytest benchmarks --benchmark-enable --benchmark-json out.json."""

from collections.abc import Callable

import pytest

from benchmarks import token_divergence_cases
from benchmarks.case import Case


@pytest.mark.parametrize("case", token_divergence_cases.cases(), ids=lambda case: case.name)
def test_token_divergence(case: Case, run_case: Callable[[Case], None]) -> None:
    run_case(case)
