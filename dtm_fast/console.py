"""What the command line shows a person: tables, progress bars, one-line errors."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from dtm_fast.measure import EXTRA_METRICS, Floor, Measurement
from dtm_fast.plan import Plan
from dtm_fast.plan.recorded import OnFinished

_LEAST_WIDTH = 20  # columns; nothing can be read with fewer


class _Console(Console):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        if self.width < _LEAST_WIDTH:  # as COLUMNS=0 says where there is no terminal
            self.width = 80

    def on_broken_pipe(self) -> None:
        """As any other output does; rich would end the program with 1, which says that a check failed."""
        raise BrokenPipeError


out = _Console()
err = _Console(stderr=True)

_LINE_EVERY = 60.0  # seconds between two lines of a progress without an end


def show_error(message: str) -> None:
    """One line on standard error, never wrapped, so that it can be searched for."""
    err.print(Text.assemble(("error:", "bold red"), " ", _one_line(message)), soft_wrap=True)


def show_note(message: str) -> None:
    """One line on standard error that is not an error."""
    err.print(Text(_one_line(message)), soft_wrap=True)


def show_written(path: object) -> None:
    """A file that was written, on standard output."""
    out.print(Text(f"wrote {path}"), soft_wrap=True)


@contextmanager
def progress(title: str, total: int | None, quiet: bool) -> Iterator[OnFinished]:
    """A bar with an ETA on standard error, or a line every tenth where that is no terminal.

    Yields what an evaluator calls after each measurement.

    Args:
        title: stands before it.
        total: about how many measurements there will be; None where nobody can know: then there is no ETA, and a line
            a minute instead of every tenth.
        quiet: nothing of this.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(elapsed_when_finished=False),
        TextColumn("{task.fields[speed]}"),
        TextColumn("{task.fields[last]}"),
    )
    with Progress(*columns, console=err, disable=quiet or not err.is_terminal) as bar:
        task = bar.add_task(title, total=total, last="", speed="")
        started = said = time.monotonic()
        done = measured = 0

        def on_finished(measurement: Measurement, known: bool) -> None:
            nonlocal done, measured, said
            done, measured = done + 1, measured + (not known)
            last = next(iter(measurement.configuration), "") if len(measurement.configuration) == 1 else ""
            now = time.monotonic()
            rate = measured / max(now - started, 1e-9)
            speed = f"{rate:.2g} configurations/s" if measured else ""
            shown = "known" if known else last
            # A plan's bisection may need a few measurements more than could be known beforehand.
            most = None if total is None else max(total, done)
            bar.update(task, completed=done, total=most, last=shown, speed=speed)
            if quiet or err.is_terminal or not measured:
                return
            if total is None and now - said >= _LINE_EVERY:
                said = now
                show_note(f"{title}: {done} measured, {speed}")
            elif total is not None and done * 10 // total > (done - 1) * 10 // total:
                show_note(f"{title}: {done}/{most}, {speed}, ETA {max(0, total - done) / rate:.0f} s")

        yield on_finished
        bar.update(task, total=done)


def show_floor(floor: Floor) -> None:
    """The base against itself: printed beside every result."""
    alone = ""
    if floor.divergent and floor.fdt is not None:
        alone = f" (mean FDT {floor.fdt:.1f}: rounding alone does that, and no treatment near it is told from none)"
    out.print(
        f"Floor: the base read at batch size {floor.batch_size} and {floor.other_batch_size} leaves its own text "
        f"at {floor.divergent} of {floor.positions} positions{alone}; margins move by at most {floor.margin:.2g} "
        f"logits; decoding with a cache fell otherwise at {floor.corrected}.",
        highlight=False,
    )


def measurement_table(title: str, measurement: Measurement, floor: Floor) -> Table:
    """All metrics of one measurement with their intervals."""
    table = Table(title=Text(title, style="table.title"))
    for column in ("metric", "mean", "95% interval", "median", "p75", "95% interval"):
        table.add_column(column, justify="left" if column == "metric" else "right")
    for metric in ("fdt", "sdt", *EXTRA_METRICS):
        if getattr(measurement, metric) is None:
            continue
        s = measurement.summary(metric)
        table.add_row(
            {"agreement": "agreement (same top p)"}.get(metric, metric.upper()),
            _number(s.mean),
            f"{_number(s.mean_interval[0])} – {_number(s.mean_interval[1])}",
            _number(s.median),
            _number(s.p75),
            f"{_number(s.p75_interval[0])} – {_number(s.p75_interval[1])}",
        )
    never = int((measurement.fdt == measurement.completion).sum())
    ties = int(measurement.ties(floor.margin).sum())
    table.caption = (
        f"{len(measurement.fdt)} probes, completion {measurement.completion} tokens (FDT is capped there); "
        f"{never} never diverge; {ties} first divergences are ties within the floor"
    )
    return table


def sweep_table(ranked: list[str], measured: Mapping[str, Measurement], ends: int = 10) -> Table:
    """The least and the most harmful components."""
    table = Table(title="Components alone, the least harmful first")
    for column in ("#", "component", "FDT_75", "FDT", "SDT", "DPPL"):
        table.add_column(column, justify="left" if column == "component" else "right")
    for place, path in enumerate(ranked, start=1):
        if ends < place <= len(ranked) - ends:
            if place == ends + 1:
                table.add_row("…", f"… {len(ranked) - 2 * ends} more …", "", "", "", "")
            continue
        m = measured[path]
        fdt, sdt = m.summary("fdt"), m.summary("sdt")
        dppl = _number(m.summary("dppl").mean) if m.dppl is not None else ""
        table.add_row(str(place), path, _number(fdt.p75), _number(fdt.mean), _number(sdt.mean), dppl)
    return table


def plan_table(plan: Plan) -> Table:
    """The plan's curve and its own point, marked."""
    table = Table(title=f"Plan: {plan.search}")
    for column in ("components", "share", "bits", "FDT_75", "FDT", "SDT", "DPPL", ""):
        table.add_column(column, justify="right")
    apart = [] if plan.chosen is None or plan.chosen in plan.curve else [plan.chosen]
    for p in (*plan.curve, *apart):
        chosen = "← plan" if p == plan.chosen else ""
        table.add_row(
            str(p.components),
            f"{p.share:.1%}",
            _number(p.bits),
            _number(p.fdt75),
            _number(p.fdt),
            _number(p.sdt) if p.sdt is not None else "",
            _number(p.dppl) if p.dppl is not None else "",
            chosen,
        )
    return table


def comparison_table(found: Mapping[str, Sequence[Measurement]], budgets: Sequence[float]) -> Table:
    """What each criterion's choice does, for each budget."""
    table = Table(title="Chosen by")
    for column in ("bits at most", "by", "components", "FDT_75", "FDT", "SDT", "DPPL", "perplexity", "KL"):
        table.add_column(column, justify="left" if column == "by" else "right")
    for place, budget in enumerate(budgets):
        for name, measured in found.items():
            m = measured[place]
            numbers = [m.summary("fdt").p75, m.summary("fdt").mean]
            others = [
                "" if getattr(m, each) is None else _number(m.summary(each).mean)
                for each in ("sdt", "dppl", "perplexity", "kl")
            ]
            table.add_row(f"{budget:g}", name, str(len(m.configuration)), *map(_number, numbers), *others)
    return table


def doctor_tables(info: Mapping[str, Any]) -> Iterator[Table]:
    """What ``backend_info()`` says: the machine, then which implementation each operation uses."""
    machine = Table(title="Machine", show_header=False, title_justify="left")
    for _ in range(2):
        machine.add_column(overflow="fold")
    for part, content in info.items():
        if part != "operations":
            for name, value in content.items():
                machine.add_row(f"{part}.{name}", str(value))
    yield machine
    operations = Table(title="Operations", title_justify="left")
    for column in ("operation", "on", "runs", "because"):
        operations.add_column(column, overflow="fold")
    for operation, devices in info["operations"].items():
        for device, choice in devices.items():
            operations.add_row(operation, device, choice["backend"], choice["reason"])
    yield operations


def _number(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"


def _one_line(message: str) -> str:
    return " ".join(message.split("\n"))
