"""Which cases have become slower, and the table that says so."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.table import seconds

FACTOR = 1.25
OK, SLOWER, BROKEN = "ok", "SLOWER", "BROKEN"
NEW, REMOVED, NOT_COMPARED = "new", "removed", "not compared"


@dataclass
class Row:
    """One case at both revisions."""

    name: str
    base: list[float] = field(default_factory=list)
    """Seconds per call, one figure per run: the fastest of the run."""
    head: list[float] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    """By role: what the revision lacks to run the case."""
    errors: dict[str, str] = field(default_factory=dict)
    """By role: how the case ended."""
    difference: str = ""
    """How the head's result differs from the base's."""

    def add(self, role: str, found: Mapping[str, Any]) -> None:
        """Take in what one run of one revision says."""
        if "seconds" in found:
            (self.base if role == "base" else self.head).append(found["seconds"])
        elif "missing" in found:
            self.missing[role] = found["missing"]
        else:
            self.errors[role] = found["error"]
        if role == "head":
            self.difference = found.get("difference", self.difference)

    @property
    def ratio(self) -> float | None:
        """The head's fastest run in units of the base's slowest: noise makes it smaller, never larger."""
        return min(self.head) / max(self.base) if self.base and self.head else None

    @property
    def verdict(self) -> str:
        if "base" in self.missing:
            return NEW
        if "head" in self.missing:
            return REMOVED
        if "base" in self.errors:
            return NOT_COMPARED
        if "head" in self.errors:
            return BROKEN
        ratio = self.ratio
        if ratio is None:
            return NOT_COMPARED
        return SLOWER if ratio > FACTOR else OK

    @property
    def fails(self) -> bool:
        return self.verdict in (SLOWER, BROKEN)

    @property
    def remark(self) -> str:
        """What the table says of the results, or why there are none."""
        reasons = {**self.missing, **self.errors}
        return "; ".join(f"{role}: {reason}" for role, reason in reasons.items()) or self.difference


def table(rows: Iterable[Row]) -> str:
    """All rows that concern at least one of the revisions, in aligned columns."""
    head = ["case", "base", "head", f"ratio (fails > {FACTOR})", "results", "verdict"]
    body = [
        [
            row.name,
            _span(row.base),
            _span(row.head),
            "–" if row.ratio is None else f"{row.ratio:.2f}",
            row.remark,
            row.verdict,
        ]
        for row in rows
        if len(row.missing) < 2
    ]
    widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
    lines = [head, ["-" * width for width in widths], *body]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _span(times: Sequence[float]) -> str:
    return f"{seconds(min(times))} .. {seconds(max(times))}" if times else "–"


def conclusion(rows: Sequence[Row]) -> str:
    """The last line."""
    failing = [row for row in rows if row.fails]
    compared = sum(row.ratio is not None or row.fails for row in rows)
    if not failing:
        return f"ok: of {compared} cases, none is slower at head: fastest run <= {FACTOR} x base's slowest"
    named = "; ".join(f"{row.name} ({row.verdict})" for row in failing)
    return f"FAILED: {len(failing)} of {compared} cases: {named}"
