"""The sections of docs/performance.md that have commands of their own: ``make bench`` keeps them as they are."""

from typing import NamedTuple


class Section(NamedTuple):
    """What stands between two marks.

    Attributes:
        name: in both marks.
        command: that writes it.
    """

    name: str
    command: str

    @property
    def begin(self) -> str:
        """The mark before it."""
        return f"<!-- {self.name}: {self.command} -->"

    @property
    def end(self) -> str:
        """The mark behind it."""
        return f"<!-- end of {self.name} -->"

    def of(self, page: str) -> str:
        """It with its marks, as it is in a page; nothing where it is not."""
        if self.begin not in page:
            return ""
        return self.begin + page.partition(self.begin)[2].partition(self.end)[0] + self.end + "\n"

    def put(self, page: str, text: str) -> str:
        """The page with ``text`` in it, in place of what was there, or at the end."""
        whole = f"{self.begin}\n{text.strip()}\n{self.end}\n"
        old = self.of(page)
        return page.replace(old, whole) if old else f"{page.rstrip()}\n\n{whole}"


EVALUATOR = Section("the evaluator", "make bench-evaluator")
GENERATION = Section("generation", "make bench-generation")


def kept(page: str) -> str:
    """All of them that a page has."""
    return "\n".join(text for each in (EVALUATOR, GENERATION) if (text := each.of(page)))
