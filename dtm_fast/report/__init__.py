"""The report of a run: a self-contained page and pictures, made from what the run directory holds."""

from pathlib import Path

from dtm_fast.report.content import read_content
from dtm_fast.report.images import curve_png, heat_map_png
from dtm_fast.report.page import page
from dtm_fast.runs import RunDirectory

__all__ = ["write_report"]


def write_report(directory: RunDirectory) -> list[Path]:
    """Writes ``report.html``; ``heatmap.png`` of components alone and ``curve.png`` of a growing joint configuration.

    The pictures are written where there is something on them.

    Args:
        directory: a run, finished or not.

    Returns:
        The paths of the files written.

    Raises:
        InputError: there is nothing to report yet, or a file of the run is not what it should be; the message names it.
    """
    content = read_content(directory)
    written = [directory.write_text("report.html", page(content))]
    pictures = {
        "heatmap.png": heat_map_png(content) if content.sweeps else None,
        "curve.png": curve_png(content) if content.curves else None,
    }
    for name, picture in pictures.items():
        if picture is not None:
            written.append(directory.write_bytes(name, picture))
        else:  # one of a search before this one would be taken for this one's
            (directory.path / name).unlink(missing_ok=True)
    return written
