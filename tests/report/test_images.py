"""The pictures: valid PNG, and something on them."""

from io import BytesIO
from pathlib import Path

import numpy as np
from made_run import components, make_run, measured, record, sweep
from matplotlib import image

from dtm_fast.compression import Int8, Prune
from dtm_fast.report import write_report
from dtm_fast.report.content import read_content
from dtm_fast.report.images import curve_png, heat_map_png
from dtm_fast.report.page import page
from dtm_fast.runs import RunDirectory


def colours(png: bytes) -> set[tuple[int, ...]]:
    pixels = (image.imread(BytesIO(png), format="png")[..., :3] * 255).round().astype(int)
    assert min(pixels.shape[:2]) > 200
    return {tuple(colour) for colour in np.unique(pixels.reshape(-1, 3), axis=0)}


def test_pictures_are_drawn(finished: RunDirectory) -> None:
    written = write_report(finished)
    assert [path.name for path in written] == ["report.html", "heatmap.png", "curve.png"]
    found = colours(written[1].read_bytes())
    # Viridis from end to end: the most harmful component and the harmless one.
    assert (68, 1, 84) in found
    assert (253, 231, 37) in found
    assert len(colours(written[2].read_bytes())) > 20


def test_a_cell_waiting_is_not_coloured(partial: RunDirectory) -> None:
    few = heat_map_png(read_content(partial))
    sweep(partial, [component["path"] for component in components()], Int8())
    many = heat_map_png(read_content(partial))
    assert _white_share(few) > _white_share(many) + 0.2


def test_treatments_are_stacked(tmp_path: Path) -> None:
    paths = [component["path"] for component in components()]
    with make_run(tmp_path / "run") as directory:
        sweep(directory, paths, Int8())
        one = image.imread(BytesIO(heat_map_png(read_content(directory))))
        sweep(directory, paths[:4], Prune(0.5))
        two = image.imread(BytesIO(heat_map_png(read_content(directory))))
    assert two.shape[0] == 2 * one.shape[0]
    assert two.shape[1] == one.shape[1]


def test_a_name_with_mathematics_is_only_a_name(tmp_path: Path) -> None:
    paths = [component["path"] for component in components()]
    with make_run(tmp_path / "run", model="$\\frac{$ broken_$") as directory:
        sweep(directory, paths, Int8())
        assert len(colours(heat_map_png(read_content(directory)))) > 20


def test_a_curve_without_dppl(partial: RunDirectory) -> None:
    paths = [component["path"] for component in components()]
    record(partial, measured(dict.fromkeys(paths[:4], Int8()), [9, 8, 7, 6]))
    content = read_content(partial)
    assert content.curves[0].points[0].dppl is None
    assert len(colours(curve_png(content))) > 20
    assert "curve-dppl" not in page(content)


def _white_share(png: bytes) -> float:
    return float((image.imread(BytesIO(png), format="png")[..., :3] == 1).all(axis=-1).mean())
