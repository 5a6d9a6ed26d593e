"""The gate's rule and its table, on figures made up."""

import pytest

from benchmarks.gate.verdict import BROKEN, NEW, NOT_COMPARED, OK, REMOVED, SLOWER, Row, conclusion, table


def timed(base: list[float], head: list[float], name: str = "op (1, 2)") -> Row:
    row = Row(name)
    for role, times in (("base", base), ("head", head)):
        for each in times:
            row.add(role, {"seconds": each})
    return row


@pytest.mark.parametrize(
    ("base", "head", "expected"),
    [
        ([1.0, 1.1, 1.2], [1.0, 1.1, 1.2], OK),
        ([1.0, 1.1, 1.2], [1.49, 3.0, 9.0], OK),  # 1.49 < 1.25 * 1.2
        ([1.0, 1.1, 1.2], [1.51, 1.51, 1.51], SLOWER),
        ([1.0, 1.0, 1.0], [1.25, 1.25, 1.25], OK),  # the bound itself passes
        ([1.0, 1.0, 9.0], [2.0, 2.0, 2.0], OK),  # base itself was that slow once
        ([1.0, 1.0, 1.0], [2.0, 2.0, 1.0], OK),  # head was once as fast as base
        ([1.0, 1.0, 1.0], [0.1, 0.1, 0.1], OK),
    ],
)
def test_only_the_fastest_of_head_against_the_slowest_of_base_counts(base, head, expected) -> None:
    row = timed(base, head)
    assert row.verdict == expected
    assert row.fails == (expected == SLOWER)
    assert row.ratio == pytest.approx(min(head) / max(base))


def test_more_runs_can_only_lower_the_ratio() -> None:
    row = timed([1.0, 1.1], [1.6, 1.7])
    assert row.verdict == SLOWER
    row.add("base", {"seconds": 1.4})
    row.add("head", {"seconds": 1.8})
    assert row.ratio == pytest.approx(1.6 / 1.4)
    assert row.verdict == OK


def test_operations_of_one_revision_only_are_named_and_never_fatal() -> None:
    new, removed = Row("sparse (1, 2)"), Row("dense (1, 2)")
    new.add("base", {"missing": "no ops.sparse"})
    new.add("head", {"seconds": 1.0})
    removed.add("base", {"seconds": 1.0})
    removed.add("head", {"missing": "no ops.dense"})
    assert (new.verdict, removed.verdict) == (NEW, REMOVED)
    assert not new.fails
    assert not removed.fails
    text = table([new, removed])
    assert "base: no ops.sparse" in text
    assert "head: no ops.dense" in text


def test_an_operation_of_neither_revision_is_no_row() -> None:
    row = Row("later (1, 2)")
    row.add("base", {"missing": "no ops.later"})
    row.add("head", {"missing": "no ops.later"})
    assert "later" not in table([row])


def test_what_ran_at_base_and_raises_at_head_fails() -> None:
    broken, other = Row("op (1, 2)"), Row("op (3, 4)")
    broken.add("base", {"seconds": 1.0})
    broken.add("head", {"error": "RuntimeError: no"})
    other.add("base", {"error": "TypeError: another signature"})
    other.add("head", {"seconds": 1.0})
    assert (broken.verdict, other.verdict) == (BROKEN, NOT_COMPARED)
    assert broken.fails
    assert not other.fails
    assert conclusion([broken, other]) == "FAILED: 1 of 1 cases: op (1, 2) (BROKEN)"


def test_the_table_says_where_results_differ() -> None:
    row = timed([1e-3], [2e-3])
    row.add("head", {"seconds": 2e-3, "difference": "DIFFERS BY 3.0e-01"})
    row.add("base", {"seconds": 1e-3, "difference": "same bits"})  # base against itself says nothing of head
    line = table([row]).splitlines()[-1]
    assert line.split("  ")[0] == "op (1, 2)"
    assert "1 ms .. 1 ms" in line
    assert "2 ms .. 2 ms" in line
    assert "2.00" in line
    assert "DIFFERS BY 3.0e-01" in line
    assert line.endswith(SLOWER)


def test_the_conclusion_names_what_is_slower() -> None:
    fine, slow = timed([1.0], [1.0], "fine"), timed([1.0], [2.0], "slow")
    assert conclusion([fine, slow]) == "FAILED: 1 of 2 cases: slow (SLOWER)"
    assert conclusion([fine]).startswith("ok: of 1 cases, none is slower at head")
