"""The regression gate on repositories of its own: this tree as it is, and with one kernel made slower."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gate.revision import run

pytestmark = pytest.mark.alone

ROOT = Path(__file__).resolve().parents[2]
KERNEL = Path("csrc/kernels/cpu/int8_linear.cpp")
SIGNATURE = "void int8_linear(CpuIsa isa, const Int8Linear& args, int num_threads)"
# What the dispatcher did once it does three times.
THRICE = f"""
namespace dtm_fast {{
{SIGNATURE} {{
  for (int i = 0; i < 3; ++i) int8_linear_once(isa, args, num_threads);
}}
}}  // namespace dtm_fast
"""


def git(repository: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.invalid", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *identity, *arguments], cwd=repository, check=True, capture_output=True)


def commit(repository: Path, tag: str) -> None:
    git(repository, "add", "--all")
    git(repository, "commit", "--quiet", "--message", tag)
    git(repository, "tag", tag)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This tree, changes and all, as the commit "fine"; then "slow" and "broken"."""
    folder = tmp_path_factory.mktemp("gate") / "repository"
    folder.mkdir()
    leave = shutil.ignore_patterns("__pycache__", "*.so", "results")
    for each in ("benchmarks", "csrc", "dtm_fast"):
        shutil.copytree(ROOT / each, folder / each, ignore=leave)
    # What is three times as slow is so at any optimization; none of it takes half off each build.
    recipe = (ROOT / "CMakeLists.txt").read_text()
    assert recipe.count('"-O3 -DNDEBUG"') == 1, "CMakeLists.txt no longer optimizes so: mend this test"
    (folder / "CMakeLists.txt").write_text(recipe.replace('"-O3 -DNDEBUG"', '"-O0 -DNDEBUG"'))
    git(folder, "init", "--quiet")
    commit(folder, "fine")
    text = (folder / KERNEL).read_text()
    assert text.count(SIGNATURE + " {") == 1, f"{KERNEL} no longer defines {SIGNATURE}: mend this test"
    slowed = text.replace(SIGNATURE, SIGNATURE.replace("int8_linear(", "int8_linear_once(")) + THRICE
    (folder / KERNEL).write_text(slowed)
    commit(folder, "slow")
    (folder / KERNEL).write_text(text + "#error this revision does not build\n")
    commit(folder, "broken")
    return folder


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the revisions are built once for all tests."""
    return tmp_path_factory.mktemp("builds")


def gate(repository: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.gate", *map(str, arguments)]
    return subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)


def test_a_slowed_kernel_is_caught_and_named(repository: Path, builds: Path, tmp_path: Path) -> None:
    ended = gate(
        *(repository, "fine", "slow", "--builds", builds, "--json", tmp_path / "found.json"),
        *("--only", "int8_linear", "--only", "quantize_int8", "--seconds", 0.1),
    )
    assert ended.returncode == 1, ended.stdout + ended.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    verdicts = {each["name"]: each["verdict"] for each in found["cases"]}
    assert {name.split()[0] for name, verdict in verdicts.items() if verdict == "SLOWER"} == {"int8_linear"}
    assert {name.split()[0] for name, verdict in verdicts.items() if verdict == "ok"} >= {"quantize_int8"}
    slower = [each for each in found["cases"] if each["verdict"] == "SLOWER"]
    assert slower
    assert all(
        len(each["base_s"]) == len(each["head_s"]) == 6 for each in slower
    )  # timed again before failing
    assert {each["remark"] for each in found["cases"]} == {"same bits"}
    last = ended.stdout.splitlines()[-1]
    assert last.startswith("FAILED: ")
    assert all(f"{each['name']} (SLOWER)" in last for each in slower)


@pytest.mark.parametrize("repetition", range(5))
def test_identical_revisions_never_fail(repository: Path, builds: Path, repetition: int) -> None:
    ended = gate(repository, "fine", "fine", "--builds", builds, "--only", "quantize_int8", "--seconds", 0.1)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.splitlines()[-1].startswith("ok: of 2 cases, none is slower at head")


def test_a_revision_that_does_not_build_is_an_error(repository: Path, tmp_path: Path) -> None:
    ended = gate(repository, "broken", "fine", "--builds", tmp_path)
    assert ended.returncode == 2
    assert "(broken) does not build; the last lines were\n" in ended.stderr
    assert "#error this revision does not build" in ended.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_revision_is_one_line(repository: Path) -> None:
    ended = gate(repository, "fine", "no-such-branch")
    assert ended.returncode == 2
    assert ended.stderr == (
        f"error: head: 'no-such-branch': no revision of {repository}, nor . or WORKTREE\n"
    )


def hear_interrupts() -> None:
    """A shell starts its background jobs deaf to SIGINT, and their children would be so too."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize(("by", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_nothing_is_left_behind_when_it_is_ended(
    repository: Path, tmp_path: Path, by: signal.Signals, code: int
) -> None:
    """In the middle of compiling the working tree."""
    command = [sys.executable, "-m", "benchmarks.gate", ".", "fine"]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        command,
        cwd=repository,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=hear_interrupts,
    ) as process:
        while not list(tmp_path.glob("*/base/build/CMakeFiles/cpu_kernels.dir")):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        process.send_signal(by)
        process.communicate(timeout=30)
    assert process.returncode == code
    assert [each.name for each in tmp_path.iterdir() if each.name.startswith("dtm-fast-gate-")] == []
    left = subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True, text=True, check=False)
    assert left.stdout == ""


def test_an_interrupt_just_when_a_command_has_ended_is_an_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    communicate = subprocess.Popen.communicate

    def interrupted(process: subprocess.Popen[str]) -> None:
        monkeypatch.undo()
        communicate(process)
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess.Popen, "communicate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(["true"])
