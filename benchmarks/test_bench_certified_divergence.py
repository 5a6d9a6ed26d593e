"""Certified token_divergence under pytest-benchmark: pytest benchmarks --benchmark-enable."""

from collections.abc import Callable

import pytest

from benchmarks import certified_divergence_cases
from benchmarks.case import Case


@pytest.mark.model
@pytest.mark.parametrize(
    "case",
    certified_divergence_cases.cases(certified_divergence_cases.QUICK_EVERY),
    ids=lambda case: case.name,
)
def test_certified_divergence(case: Case, run_case: Callable[[Case], None]) -> None:
    run_case(case)
