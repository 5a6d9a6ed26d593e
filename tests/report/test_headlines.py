"""What a report says first of each search, and how it was run."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from made_plans import write_beam, write_comparison, write_joint, write_losses, write_rounds, written
from made_run import components, make_run, sweep

from dtm_fast.compression import Int4, Int8
from dtm_fast.plan import Plan
from dtm_fast.report import write_report
from dtm_fast.report.content import Content, read_content
from dtm_fast.report.headlines import headline, tiles
from dtm_fast.report.page import page
from dtm_fast.report.prose import how_it_was_run, meanings
from dtm_fast.report.wording import counted, listed, number, percent
from dtm_fast.runs import RunDirectory


def content_of(path: Path, write: Callable[[RunDirectory], Plan], **change: object) -> Content:
    with make_run(path / "run") as directory:
        write(directory)
        written(directory, "plan.json", change)
        return read_content(directory)


def plan_row(content: Content) -> str:
    found = re.search("<dt>plan</dt><dd>(.*?)</dd>", how_it_was_run(content))
    assert found is not None
    return found[1]


def test_rounds(tmp_path: Path) -> None:
    content = content_of(tmp_path, write_rounds)
    # FDT 26, 13, 0 and 33; 440 of 600 weights of each layer, its last component wholly.
    assert headline(content) == [
        "Pruned to a mean sparsity of 73.3% in 3 rounds, FDT_75 is 27.75 of 40 tokens and the mean FDT 18.",
        "4 of 12 components lose more than 90% of their weights, 4 of them all.",
    ]
    size, fdt75, fdt, sdt, probes = tiles(content)
    assert size == ("mean sparsity", "73.3%", "after 3 rounds")
    assert fdt75 == ("FDT_75", "27.75", "of 40 tokens")
    assert fdt[:2] == ("mean FDT", "18")
    assert fdt[2].startswith("95% interval ")
    assert sdt == ("SDT", "2", "divergent tokens of 40")
    assert probes[1] == "4 probes"
    assert plan_row(content) == "3 pruning rounds, which add 36.7%, 18.3%, 18.3% to the mean sparsity"
    assert "mean sparsity" in meanings(content)


def test_rounds_that_prune_little_say_no_more(tmp_path: Path) -> None:
    content = content_of(tmp_path, lambda directory: write_rounds(directory, (0.9,)))
    assert len(headline(content)) == 1
    assert plan_row(content) == "1 pruning round, which add 66% to the mean sparsity"


def test_a_beam(tmp_path: Path) -> None:
    content = content_of(tmp_path, lambda directory: write_beam(directory, (Int8(), Int4(5))))
    # Harm by 15 tokens: 32 (7.5 rounds to 8), 25, 18 (22.5 rounds to 22) and 36; 1500 of 2,400 weights.
    assert headline(content) == [
        "With 8 of 12 components (62% of their parameters) converted to int8 and int4(5), FDT_75 is 33 of 40 tokens "
        "and the mean FDT 27.75. Up to 2 components (12% of their parameters) FDT_75 stays at its ceiling of 40."
    ]
    assert next(iter(tiles(content))) == ("converted", "8 of 12", "62% of their parameters")
    assert plan_row(content) == (
        "beam of width 3 by FDT<sub>75</sub>, to depth 8; int8 and int4(5) of 12 units, "
        "the 5 least harmful alone at each depth"
    )


def test_a_beam_that_looks_at_all(tmp_path: Path) -> None:
    with make_run(tmp_path / "run") as directory:
        how = {**write_beam(directory).how, "among": None, "by": "kl"}
        written(directory, "plan.json", {"how": how})
        content = read_content(directory)
    assert plan_row(content) == "beam of width 3 by KL, to depth 8; int8 of 12 units, all at each depth"


def test_a_joint_search(tmp_path: Path) -> None:
    content = content_of(tmp_path, write_joint)
    (sentence,) = headline(content)
    # Harm by 20 tokens: 30, 20, 10 and 35. Ten of twelve by turns int8, int4 and prune.
    assert sentence == (
        "Within 10 effective bits a weight, FDT_75 is 31.25 of 40 tokens and the mean FDT 23.75: of 12 components "
        "4 in int8, 3 in int4(5), 3 in prune(0.7) and 2 as they were."
    )
    assert [tile[0] for tile in tiles(content)][:3] == ["effective bits", "compressed", "FDT_75"]
    assert plan_row(content) == (
        "joint search of int8, int4(5) and prune(0.7) for 12 units within 10 and 15.5 effective bits a weight, "
        "1 refinement each"
    )
    assert "effective bits" in meanings(content)
    with make_run(tmp_path / "confirmed") as directory:
        how = write_joint(directory).how
        written(directory, "plan.json", {"how": {**how, "confirmed_on": 9}})
        content = read_content(directory)
    assert "the mean FDT 23.75 on 9 probes that the search had not seen: of 12" in headline(content)[0]
    assert plan_row(content).endswith("1 refinement each, confirmed on 9 other probes")
    assert "are of 9 probes that the search had not seen" in page(content)


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (write_rounds, "The rounds are too small to prune a single weight: the plan is empty."),
        (write_joint, "Within 10 effective bits a weight nothing has to be compressed: the plan is empty."),
        (write_beam, "No component can be converted: the plan is empty."),
    ],
)
def test_an_empty_plan(tmp_path: Path, write: Callable[[RunDirectory], Plan], said: str) -> None:
    content = content_of(tmp_path, write, configuration={}, chosen=None)
    assert headline(content) == [said]


def test_an_empty_plan_of_an_empty_run_is_reported(tmp_path: Path) -> None:
    with make_run(tmp_path / "run") as directory:
        plan = Plan({}, "by hand", {})
        directory.write_json("plan.json", plan.to_json())
        (written_,) = write_report(directory)
    page = written_.read_text()
    assert "the plan is empty" in page
    # There is no picture to point at.
    assert "heatmap.png" not in page


def test_results_come_before_what_they_come_from(tmp_path: Path) -> None:
    with make_run(tmp_path / "run") as directory:
        sweep(directory, [component["path"] for component in components()], Int8())
        write_joint(directory)
        write_comparison(directory)
        write_losses(directory, "round-1", 1, [3.0, 2.0])
        page = write_report(directory)[0].read_text()
    titles = re.findall("<h2>(.*?)</h2>", page)
    assert titles == [
        "The plan, component by component",
        "What each size costs",
        "What choosing by FDT buys",
        "Recovery training",
        "Each component alone in int8",
        "What the numbers mean",
        "How it was run",
    ]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (39.96, "39.96"),
        (39.996, "40"),
        (999.4, "999.4"),
        (1234.5, "1,234"),
        (5e6, "5,000,000"),
        (1e30, "1e+30"),
    ],
)
def test_numbers(value: float, text: str) -> None:
    assert number(value) == text


def test_words() -> None:
    assert [listed(names) for names in ([], ["a"], ["a", "b"], ["a", "b", "c"])] == [
        "",
        "a",
        "a and b",
        "a, b and c",
    ]
    assert [counted(count, "round") for count in (0, 1, 2)] == ["0 rounds", "1 round", "2 rounds"]
    assert [percent(share) for share in (0, 0.0725, 1 / 3, 1)] == ["0%", "7.25%", "33.3%", "100%"]
