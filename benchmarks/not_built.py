"""The goals for operations that do not exist yet: they stay in the table, so that nobody takes it for complete."""

from benchmarks.goals import Verdict

_GOALS = {
    "sparse_linear": [
        ("M = 2048, density 0.5", "≥ 1.0 × dense oneDNN float32"),
        ("M = 2048, density 0.25", "≥ 2.0 × dense oneDNN float32"),
        ("M = 2048, density 0.1", "≥ 4.0 × dense oneDNN float32"),
        ("M = 2048, density 0.05", "≥ 7.0 × dense oneDNN float32"),
        ("M = 1, density 0.5, weights out of cache", "≥ 1.6 × the dense product"),
        ("M = 1, density 0.25, weights out of cache", "≥ 3 × the dense product"),
        ("M = 1, density 0.1, weights out of cache", "≥ 6 × the dense product"),
        ("M = 1, density 0.05, weights out of cache", "≥ 9 × the dense product"),
    ],
    "certified token_divergence": [
        ("SmolLM2, single int8 components", "≥ 25 × the full reduction"),
        ("SmolLM2, single int8 components", "answers identical to the full head at every position"),
    ],
}


def verdicts() -> list[Verdict]:
    """One verdict per goal of every operation without a benchmark."""
    return [
        Verdict(f"{operation} {row}", goal, None, "not built yet: no benchmark of this operation")
        for operation, goals in _GOALS.items()
        for row, goal in goals
    ]
