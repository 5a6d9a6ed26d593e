"""The Triton kernels in Triton's interpreter, which needs no GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent

pytest.importorskip("triton", exc_type=ImportError)


@pytest.mark.once
@pytest.mark.process
def test_every_kernel_gives_what_its_twin_gives() -> None:
    """In a process of its own: whether a kernel is interpreted is decided once, when Triton is imported."""
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join((str(HERE), str(HERE.parents[1]))),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "OMP_NUM_THREADS": "1",
    }
    arguments = ["-q", "-c", os.devnull, "--rootdir", str(HERE), "--noconftest", "-p", "no:cacheprovider"]
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments, "-p", "interpreter", str(HERE / "kernel_cases.py")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout[-8000:] + ended.stderr[-2000:]
