"""A revision of the repository as a folder with its native code built."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

WORKING_TREE = (".", "WORKTREE")
_LAST_LINES = 25


class GateError(Exception):
    """Why there is nothing to compare, for standard error."""


@dataclass(frozen=True)
class Revision:
    role: str
    """"base" or "head"."""
    name: str
    """As the caller wrote it."""
    commit: str | None
    """None: the working tree as it is."""

    @property
    def text(self) -> str:
        short = "the working tree" if self.commit is None else self.commit[:12]
        return short if self.name == self.commit else f"{short} ({self.name})"


def resolve(repository: Path, role: str, name: str) -> Revision:
    """The revision that a name stands for."""
    if name in WORKING_TREE:
        return Revision(role, name, None)
    ended = _git(repository, "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}", check=False)
    if ended.returncode != 0:  # silently, unless something else than the name is wrong
        unknown = f"no revision of {repository}, nor {' or '.join(WORKING_TREE)}"
        raise GateError(f"{role}: {name!r}: {ended.stdout.strip() or unknown}")
    return Revision(role, name, ended.stdout.strip())


def built(repository: Path, revision: Revision, temporary: Path, kept: Path | None) -> Path:
    """The folder of the revision with its native code: a commit built earlier from `kept`, else made anew."""
    if kept is None or revision.commit is None:
        return _made(repository, revision, temporary / revision.role)
    folder = kept / revision.commit
    if not folder.exists():
        kept.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept, prefix="unfinished-") as unfinished:
            _made(repository, revision, Path(unfinished) / revision.role).rename(folder)
    return folder


def _made(repository: Path, revision: Revision, folder: Path) -> Path:
    folder.mkdir()
    if revision.commit is None:
        _copy_working_tree(repository, folder)
    else:
        archive = folder.with_suffix(".tar")
        _git(repository, "archive", "--format=tar", f"--output={archive}", revision.commit)
        run(["tar", "-xf", str(archive), "-C", str(folder)])
    _build(revision, folder)
    return folder


def _copy_working_tree(repository: Path, folder: Path) -> None:
    listed = _git(repository, "ls-files", "-z", "--cached", "--others", "--exclude-standard").stdout
    for each in filter(None, listed.split("\0")):
        if (repository / each).is_file():  # what is deleted here is still listed
            (folder / each).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(repository / each, folder / each)


def _build(revision: Revision, folder: Path) -> None:
    """Build dtm_fast._cpu into the folder's package, as setup.py does, without installing anything."""
    try:
        import pybind11
    except ImportError:
        raise GateError("pybind11 is needed to build the revisions: pip install pybind11") from None
    # Tools that live beside the interpreter are found although its environment is not activated.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    cmake, ninja = shutil.which("cmake", path=path), shutil.which("ninja", path=path)
    if cmake is None:
        raise GateError("cmake is needed to build the revisions, and is not installed")
    build = folder / "build"
    arguments = [
        "-DDTM_FAST_PYTHON=ON",
        "-DDTM_FAST_CUDA=OFF",
        f"-DDTM_FAST_OUTPUT_DIR={folder / 'dtm_fast'}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        *([] if ninja is None else ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]),
    ]
    jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
    for command in (
        [cmake, "-S", str(folder), "-B", str(build), *arguments],
        [cmake, "--build", str(build), "--target", "_cpu", "--parallel", jobs],
    ):
        ended = run(command, check=False)
        if ended.returncode != 0:
            last = "\n".join(ended.stdout.rstrip().splitlines()[-_LAST_LINES:])
            raise GateError(f"{revision.role}: {revision.text} does not build; the last lines were\n{last}")


def _git(repository: Path, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return run(["git", "-C", str(repository), *arguments], check=check)


def run(command: Sequence[str], check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; if we are ended before, so is everything that it started.

    Standard error comes with standard output. With `check`, raise GateError if it fails.
    """
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # a group of its own, so that cmake's compilers can be ended with it
        )
    except OSError as error:
        raise GateError(f"{command[0]}: {error.strerror}") from None
    with process:
        try:
            said, _ = process.communicate()
        except BaseException:
            with suppress(ProcessLookupError):  # it had just ended
                os.killpg(process.pid, signal.SIGKILL)
            with suppress(ValueError):  # and its pipe was read and closed
                process.communicate()  # until the last of the group has closed the pipe
            raise
    if check and process.returncode != 0:
        raise GateError(f"{' '.join(command[:4])} …: {(said.strip().splitlines() or ['failed'])[-1]}")
    return subprocess.CompletedProcess(list(command), process.returncode, said)
