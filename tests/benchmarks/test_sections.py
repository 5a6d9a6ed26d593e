"""What has commands of its own in docs/performance.md."""

import pytest

from benchmarks import machine
from benchmarks.sections import EVALUATOR, GENERATION, kept

pytestmark = pytest.mark.once


def test_a_section_is_put_at_the_end_and_then_in_its_place() -> None:
    page = GENERATION.put("# Page\n", "## Second\n\ntext\n")
    page = EVALUATOR.put(page, "## Third")
    assert page == (
        "# Page\n\n<!-- generation -->\n## Second\n\ntext\n<!-- end of generation -->\n\n"
        "<!-- the evaluator -->\n## Third\n<!-- end of the evaluator -->\n"
    )
    again = GENERATION.put(page, "other")
    assert GENERATION.of(again) == "<!-- generation -->\nother\n<!-- end of generation -->"
    assert EVALUATOR.of(again) == EVALUATOR.of(page)
    assert again.startswith("# Page\n\n<!-- generation")


def test_what_is_kept_are_all_sections_of_a_page_in_one_order() -> None:
    page = EVALUATOR.put(GENERATION.put("# Page", "one"), "two")
    assert kept(page) == EVALUATOR.of(page) + "\n\n" + GENERATION.of(page)
    assert kept("# Page\n") == GENERATION.of("# Page\n") == ""


def test_the_committed_page_has_its_sections() -> None:
    page = (machine.ROOT / "docs" / "performance.md").read_text()
    assert EVALUATOR.of(page)
    assert EVALUATOR.put(page, EVALUATOR.of(page).partition("\n")[2].rpartition("<!--")[0]) == page
