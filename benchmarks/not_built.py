"""The goals for operations that do not exist yet: they stay in the table, so that nobody takes it for complete."""

from benchmarks.goals import Verdict

_GOALS = {
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
