from types import SimpleNamespace

import pytest

from dtm_fast import console

ALONE = SimpleNamespace(configuration={"a": None})


@pytest.fixture
def seconds(monkeypatch) -> list[float]:
    """The time that it is; no terminal is there."""
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    return now


def finish(seconds: list[float], total: int | None, count: int, quiet: bool = False) -> None:
    """``count`` measurements of 25 seconds each."""
    with console.progress("beam", total, quiet) as on_finished:
        for _ in range(count):
            seconds[0] += 25
            on_finished(ALONE, False)


def test_a_line_every_tenth_with_what_is_left(seconds, capsys):
    finish(seconds, 40, 9)
    assert capsys.readouterr().err.splitlines() == [
        "beam: 4/40, 0.04 configurations/s, ETA 900 s",
        "beam: 8/40, 0.04 configurations/s, ETA 800 s",
    ]


def test_a_line_a_minute_without_an_end_where_nobody_knows_it(seconds, capsys):
    finish(seconds, None, 7)
    assert capsys.readouterr().err.splitlines() == [
        "beam: 3 measured, 0.04 configurations/s",
        "beam: 6 measured, 0.04 configurations/s",
    ]


def test_more_than_were_expected_are_counted_on(seconds, capsys):
    finish(seconds, 1, 2)
    assert capsys.readouterr().err.splitlines()[-1] == "beam: 2/2, 0.04 configurations/s, ETA 0 s"


def test_quiet_says_nothing(seconds, capsys):
    finish(seconds, None, 7, quiet=True)
    finish(seconds, 7, 7, quiet=True)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("total", [None, 9])
def test_a_bar_ends_with_as_many_as_there_were(seconds, monkeypatch, total):
    monkeypatch.setattr(console.err, "_force_terminal", True)
    bars = []
    plain = console.Progress.__enter__
    monkeypatch.setattr(console.Progress, "__enter__", lambda bar: bars.append(bar) or plain(bar))
    finish(seconds, total, 5)
    (task,) = bars[0].tasks
    assert (task.completed, task.total) == (5, 5)


@pytest.mark.parametrize("columns", ["0", "1"])
def test_a_width_in_which_nothing_can_be_read_is_none(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    assert type(console.out)().width == 80
