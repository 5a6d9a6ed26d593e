"""What all benchmark files share: run a case under pytest-benchmark, with its peers beside it."""

from collections.abc import Callable

import pytest
import torch

from benchmarks import machine
from benchmarks.case import OURS, SHORT_DTYPE, Case, Result, checked
from benchmarks.interleave import measure


@pytest.fixture(scope="session")
def software() -> dict[str, object]:
    about = machine.describe()
    return {key: about[key] for key in ("isa", "threads", "torch", "dtm_fast", "git_sha", "cpu_model")}


@pytest.fixture
def run_case(
    benchmark, request: pytest.FixtureRequest, software: dict[str, object]
) -> Callable[[Case], None]:
    """Benchmark a case: ours under pytest-benchmark, the peers in interleaved rounds for `speedup_vs`.

    With --benchmark-disable (the default of this project) a small shape is computed and checked once.
    """

    def run(case: Case) -> None:
        disabled = request.config.getoption("benchmark_disable") and not request.config.getoption(
            "benchmark_enable"
        )
        if disabled:
            case = case.shrunk()
        contest = case.build(case)
        good, unavailable, wrong = checked(contest)
        assert not wrong
        assert OURS not in unavailable, unavailable[OURS]
        ours = next(each for each in good if each.name == OURS)
        turn = 0

        def one_call() -> object:
            nonlocal turn
            turn = (turn + 1) % len(ours.calls)
            return ours.calls[turn]()

        benchmark.group = case.name
        benchmark.extra_info.update(software | _figures(case) | {"not_available": unavailable})
        benchmark.pedantic(one_call, rounds=1 if disabled else 20, warmup_rounds=0 if disabled else 3)
        if disabled:
            return
        result = Result(case, measure(good, rounds=3).timings, unavailable)
        benchmark.extra_info |= {
            "gflops": result.rate(),
            "gbps": result.bandwidth(),
            "speedup_vs": {name: result.speed_ratio(name) for name in result.timings if name != OURS},
        }

    torch.manual_seed(0)
    return run


def _figures(case: Case) -> dict[str, object]:
    return {
        "op": case.operation,
        "impl": OURS,
        "M": case.M,
        "N": case.N,
        "K": case.K,
        "dtype": SHORT_DTYPE[case.dtype],
        "sparsity": case.sparsity,
        "n_variants": case.variants,
        "flops": case.flops,
        "bytes": case.bytes,
    }
