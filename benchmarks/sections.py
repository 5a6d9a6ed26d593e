"""Sections of the pages in docs that programs write, each between two marks; what stands around them is left alone."""

import re
from typing import NamedTuple


class Section(NamedTuple):
    """What stands between ``<!-- name -->`` and ``<!-- end of name -->``."""

    name: str

    def of(self, page: str) -> str:
        """It with its marks, as it is in a page; nothing where it is not."""
        found = re.search(
            f"<!-- {re.escape(self.name)} -->.*?<!-- end of {re.escape(self.name)} -->", page, re.S
        )
        return found[0] if found else ""

    def put(self, page: str, text: str) -> str:
        """The page with ``text`` in it, in place of what was there, or at the end."""
        whole = f"<!-- {self.name} -->\n{text.strip()}\n<!-- end of {self.name} -->"
        old = self.of(page)
        return page.replace(old, whole) if old else f"{page.rstrip()}\n\n{whole}\n"


EVALUATOR = Section("the evaluator")
GENERATION = Section("generation")
GPU = Section("a GPU")


def kept(page: str) -> str:
    """Those of docs/performance.md that have commands of their own, and that ``make bench`` leaves as they are."""
    return "\n\n".join(text for each in (EVALUATOR, GENERATION, GPU) if (text := each.of(page)))
