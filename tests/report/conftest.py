"""Made-up runs that several tests read."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from made_run import components, make_run, sweep, write_plan

from dtm_fast.compression import Int8
from dtm_fast.runs import RunDirectory


@pytest.fixture
def finished(tmp_path: Path) -> Iterator[RunDirectory]:
    """All components swept under int8, a curve of three points and a plan of 6 components."""
    paths = [component["path"] for component in components()]
    with make_run(tmp_path / "run") as directory:
        sweep(directory, paths, Int8())
        write_plan(directory, paths, sizes=(3, 6, 9), chosen=6, min_fdt=30.0)
        yield directory


@pytest.fixture
def partial(tmp_path: Path) -> Iterator[RunDirectory]:
    """Five of twelve components swept, nothing else."""
    with make_run(tmp_path / "run") as directory:
        sweep(directory, [component["path"] for component in components()[:5]], Int8())
        yield directory
