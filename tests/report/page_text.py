"""A page of a report, read as text."""

import json
import re
from html.parser import HTMLParser
from typing import Any


class Elements(HTMLParser):
    """All elements with their attributes, and the text outside scripts and styles."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._inside = ""
        self.feed(content)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = tag

    def handle_data(self, data: str) -> None:
        if self._inside not in ("script", "style"):
            self.text += data

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def count(self, tag: str) -> int:
        return sum(found == tag for found, _ in self.elements)


def figure_in(page: str, identity: str) -> dict[str, Any]:
    """What Plotly is given for the figure of this name."""
    place = rf'<div class="figure" id="{identity}"[^>]*></div>'
    found = re.search(place + r'<script type="application/json">(.*?)</script>', page, re.S)
    assert found is not None, identity
    figure: dict[str, Any] = json.loads(found[1])
    return figure


def figures_in(page: str) -> list[str]:
    """The names of all figures, in the page's order."""
    return re.findall(r'<div class="figure" id="([^"]*)"', page)


def table_in(page: str, summary: str) -> list[list[str]]:
    """The cells of the table that opens under ``summary``, the head first."""
    part = page[page.index(f"<summary>{summary}") :]
    rows = re.findall(r"<tr>(.*?)</tr>", part[: part.index("</table>")], re.S)
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.S) for row in rows]
