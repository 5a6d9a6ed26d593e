"""Recovery trainings: every losses.json of a run, its figure and its table."""

from typing import Any

import pytest
from made_plans import write_losses, written
from page_text import figure_in, figures_in, table_in

from dtm_fast.errors import RunError
from dtm_fast.report import write_report
from dtm_fast.report.content import read_content
from dtm_fast.report.losses import Training
from dtm_fast.report.page import page
from dtm_fast.runs import RunDirectory


def test_what_is_read(partial: RunDirectory) -> None:
    write_losses(partial, "round-10", 1, [4.0, 3.5])
    write_losses(partial, "round-9", 2, [5.0, 4.5])
    write_losses(partial, "later/round-1", 0, [3])
    # Not in a folder: not a training's.
    (partial.path / "losses.json").write_text("[]")
    assert read_content(partial).trainings == [
        Training("later/round-1", 0, [3]),
        Training("round-9", 2, [5, 4.5]),
        Training("round-10", 1, [4, 3.5]),
    ]


@pytest.mark.parametrize("folder", ["checkpoint-5150", ".unfinished-x"])
def test_a_training_that_goes_on_is_none_yet(folder: str, partial: RunDirectory) -> None:
    write_losses(partial, "round-1", 1, [4.0, 3.5])
    unfinished = partial.path / "round-2" / "recovery" / folder
    unfinished.mkdir(parents=True)
    (unfinished / "losses.json").write_text("[4.0, 3.5]")
    assert read_content(partial).trainings == [Training("round-1", 1, [4, 3.5])]


def test_both_parts_are_told_apart(partial: RunDirectory) -> None:
    write_losses(partial, "round-1", 3, [5.0, 4.0, 4.25, 3.5, 3.75])
    found = page(read_content(partial))
    masked, unmasked = figure_in(found, "training-0")["data"]
    assert (masked["name"], masked["x"], masked["y"]) == ("with the mask", [1, 2, 3], [5, 4, 4.25])
    assert (unmasked["name"], unmasked["x"], unmasked["y"]) == ("without", [4, 5], [3.5, 3.75])
    assert masked["line"]["color"] != unmasked["line"]["color"]
    assert masked["line"]["dash"] != unmasked["line"]["dash"]
    assert table_in(found, "The trainings as a table")[1:] == [
        ["round-1", "with the mask", "1 to 3", "5", "4.25", "4"],
        ["round-1", "without", "4 to 5", "3.5", "3.75", "3.5"],
    ]


def test_a_part_without_steps_is_not_shown(partial: RunDirectory) -> None:
    write_losses(partial, "a", 0, [5.0, 4.0])
    write_losses(partial, "b", 2, [5.0, 4.0])
    found = page(read_content(partial))
    assert figures_in(found)[:2] == ["training-0", "training-1"]
    assert [line["name"] for line in figure_in(found, "training-0")["data"]] == ["without"]
    assert [line["name"] for line in figure_in(found, "training-1")["data"]] == ["with the mask"]


def test_without_trainings_nothing_is_shown(partial: RunDirectory) -> None:
    assert read_content(partial).trainings == []
    assert "training" not in "".join(figures_in(page(read_content(partial))))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"losses": []}, "2 of 0 steps were masked"),
        ({"losses": [1.0]}, "2 of 1 steps were masked"),
        ({"losses": [1.0, None, 2.0]}, "None is no number"),
        ({"losses": [1.0, float("nan"), 2.0]}, "nan is not finite"),
        ({"losses": "none"}, "'none' is no list"),
        ({"masked": -1}, "-1 is no whole number of at least 0"),
        ({"masked": 1.5}, "1.5 is no whole number of at least 0"),
        ({"masked": True}, "True is no whole number of at least 0"),
    ],
)
def test_bad_losses_are_refused(partial: RunDirectory, change: dict[str, Any], said: str) -> None:
    write_losses(partial, "round-1", 2, [3.0, 2.0, 1.0])
    written(partial, "round-1/losses.json", change)
    _refuses(partial, said)


@pytest.mark.parametrize("text", ["", "[]", "null", '{"masked": 1}', '{"losses": [1]}'])
def test_losses_that_are_none_are_refused(partial: RunDirectory, text: str) -> None:
    write_losses(partial, "round-1", 2, [3.0, 2.0, 1.0])
    (partial.path / "round-1" / "losses.json").write_text(text)
    _refuses(partial, "")


def _refuses(directory: RunDirectory, said: str) -> None:
    with pytest.raises(RunError) as refused:
        write_report(directory)
    assert str(refused.value).startswith(f"{directory.path / 'round-1' / 'losses.json'}: ")
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)
