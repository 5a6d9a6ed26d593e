"""The command line: ``dtm-fast COMMAND``, one for each search, for checkpoints and for reports."""

import io
import json
import os
import sys
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from dtm_fast import console
from dtm_fast.cli import checkpoints, searches
from dtm_fast.cli.options import AsJson
from dtm_fast.cli.setting import print_json, write_report_of
from dtm_fast.errors import InputError, MeasurementError, TrainingError
from dtm_fast.ops import backend_info
from dtm_fast.ops.native import forced_cpu_isa
from dtm_fast.runs import RunDirectory
from dtm_fast.version import __version__

_BROKEN_PIPE = 128 + 13  # what a shell says of a program that SIGPIPE ended


class _Commands(TyperGroup):
    """What all commands begin and end with."""

    def invoke(self, ctx: Any) -> Any:
        """Runs one, if the kernels can run as they are asked to, until all that it says is written."""
        forced_cpu_isa()
        try:
            ended = super().invoke(ctx)
            if sys.stdout is not None:  # as it is where it was closed before
                sys.stdout.flush()
        except KeyboardInterrupt:
            console.show_note("interrupted: what was not finished is not kept")
            raise typer.Exit(130) from None
        except BrokenPipeError:  # who read has seen enough, as of other programs
            _write_nowhere()
            raise typer.Exit(_BROKEN_PIPE) from None
        return ended


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="What compressing each part of a language model does to the text it writes, and the compression planned.",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def _before_all(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Says it, and ends.")
    ] = False,
) -> None:
    pass


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Says what machine this is and which implementation each operation uses, and why."""
    info = backend_info()
    if as_json:
        print(json.dumps(info, indent=2))
        return
    for table in console.doctor_tables(info):
        console.out.print(table)


searches.add_to(app)
checkpoints.add_to(app)


@app.command()
def report(run: Annotated[Path, typer.Argument(help="A run directory.")], as_json: AsJson = False) -> None:
    """Writes report.html, heatmap.png and curve.png of a run, finished or not."""
    with RunDirectory.read(run) as directory:
        written = write_report_of(directory)
    if as_json:
        print_json({"written": [str(path) for path in written]})
        return
    for path in written:
        console.show_written(path)


def main() -> None:
    """Runs the command line; exit codes: 0 ok, 1 a check failed, 2 unusable input or output.

    130 where it was interrupted, and 141 where nobody reads on.
    """
    # Their functions would import both, which takes seconds; a command that needs a model imports them later.
    os.environ.update(
        TRANSFORMERS_VERBOSITY="error", HF_HUB_VERBOSITY="error", HF_HUB_DISABLE_PROGRESS_BARS="1"
    )
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal that has no arrows gets to read the rest.
        sys.stdout.reconfigure(errors="backslashreplace")
    warnings.showwarning = lambda message, *_, **__: console.show_note(f"warning: {message}")
    try:
        app()
    except InputError as error:
        _end(str(error), 2)
    except (MeasurementError, TrainingError) as error:
        _end(str(error), 1)
    except OSError as error:
        if error.filename is not None:
            _end(f"{error.filename}: {error.strerror}", 2)
        _write_nowhere()
        _end(f"the output cannot be written: {error.strerror}", 2)


def _end(why: str, code: int) -> NoReturn:
    with suppress(OSError):  # where nothing can be said the code says it
        console.show_error(why)
    sys.exit(code)


def _write_nowhere() -> None:
    """What stays in the buffer would fail once more when Python ends."""
    if sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
