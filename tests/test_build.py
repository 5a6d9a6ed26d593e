"""The build: which extensions setup.py builds, and that no instruction set leaks into baseline code."""

import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).resolve().parent.parent


def kernel_objects() -> list[Path]:
    """Object files of the build that setup.py drives."""
    folders = sorted(
        ROOT.glob("build/cmake-*/CMakeFiles/cpu_kernels.dir"), key=lambda each: each.stat().st_mtime
    )
    if not folders:
        return []
    return sorted(folders[-1].rglob("*.o")) + sorted(folders[-1].parent.glob("_cpu.dir/**/*.o"))


def tool(*command: str) -> str:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def objects() -> list[Path]:
    found = kernel_objects()
    if not found:
        pytest.skip("no CMake build folder under build/")
    return found


def test_baseline_objects_have_no_avx_instructions(objects: list[Path]) -> None:
    baseline = [each for each in objects if not re.search("_avx|_amx", each.name)]
    assert {"cpu_features.cpp.o", "masked_linear.cpp.o"} <= {each.name for each in baseline}
    for each in baseline:
        wide = re.findall(
            r"^.*%[yz]mm.*$", tool("objdump", "-d", "--no-show-raw-insn", str(each)), re.MULTILINE
        )
        assert not wide, f"{each.name}: {wide[0]}"


def test_each_instruction_set_stays_in_its_files(objects: list[Path]) -> None:
    for each in objects:
        if "_avx2" in each.name:
            assert "%zmm" not in tool("objdump", "-d", "--no-show-raw-insn", str(each)), each.name
        if "_amx" not in each.name:
            assert "%tmm" not in tool("objdump", "-d", "--no-show-raw-insn", str(each)), each.name
        if "_avx512." in each.name:
            assert "vpdpbusd" not in tool("objdump", "-d", "--no-show-raw-insn", str(each)), each.name
        if "_avx512_bf16" not in each.name and "_amx" not in each.name:
            assert "vdpbf16ps" not in tool("objdump", "-d", "--no-show-raw-insn", str(each)), each.name


def test_no_function_compiled_for_an_instruction_set_can_replace_a_baseline_one(objects: list[Path]) -> None:
    """A weak symbol (inline function, template) would be merged with the one of a baseline file."""
    for each in objects:
        if re.search("_avx|_amx", each.name):
            weak = re.findall(r"^\S+ [WVu] (.*)$", tool("nm", "-C", str(each)), re.MULTILINE)
            assert not weak, f"{each.name}: {weak}"


def extensions(monkeypatch: pytest.MonkeyPatch, **environment: str) -> list[str]:
    """The names of the extension modules that setup.py would build."""
    for name in ("DTM_FAST_NATIVE", "DTM_FAST_CUDA", "CXX", "CUDACXX"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    given: dict[str, list[setuptools.Extension]] = {}
    monkeypatch.setattr(setuptools, "setup", lambda **keywords: given.update(keywords))
    runpy.run_path(str(ROOT / "setup.py"))
    return [each.name for each in given["ext_modules"]]


def test_native_code_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    assert extensions(monkeypatch, DTM_FAST_NATIVE="OFF") == []


def test_without_tools_the_build_says_so_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert extensions(monkeypatch, PATH="") == []
    assert "*** dtm-fast: installing WITHOUT native code: " in capsys.readouterr().err
    with pytest.raises(SystemExit, match="native code was asked for, but"):
        extensions(monkeypatch, PATH="", DTM_FAST_NATIVE="ON")


def test_cuda_can_be_switched(monkeypatch: pytest.MonkeyPatch) -> None:
    if extensions(monkeypatch) == []:
        pytest.skip("no tools to build native code here")
    assert extensions(monkeypatch, DTM_FAST_CUDA="OFF") == ["dtm_fast._cpu"]
    assert extensions(monkeypatch, DTM_FAST_CUDA="ON") == ["dtm_fast._cpu", "dtm_fast._cuda"]


def test_gpu_kernels_need_native_code(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="DTM_FAST_CUDA=ON needs native code, but DTM_FAST_NATIVE=OFF"):
        extensions(monkeypatch, DTM_FAST_NATIVE="OFF", DTM_FAST_CUDA="ON")


def test_an_empty_switch_is_none_and_a_compiler_may_have_flags(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("cmake", "my-compiler", "make"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    given = {"PATH": str(tmp_path), "DTM_FAST_NATIVE": " ", "DTM_FAST_CUDA": ""}
    assert extensions(monkeypatch, **given, CXX="my-compiler -O2") == ["dtm_fast._cpu"]
    assert extensions(monkeypatch, **given, CXX="another -O2") == []
    (tmp_path / "make").unlink()
    assert extensions(monkeypatch, **given, CXX="my-compiler -O2") == []


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A copy of what setuptools looks at, without modules that were built."""
    copy = tmp_path / "copy"
    shutil.copytree(
        ROOT / "dtm_fast", copy / "dtm_fast", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "CMakeLists.txt"):
        shutil.copy(ROOT / name, copy)
    return copy


def build(sources: Path, hook: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a hook of the build backend as pip does; what it makes lies in ``out`` beside the sources."""
    out = sources.parent / "out"
    out.mkdir(exist_ok=True)
    code = f"import setuptools.build_meta as backend; backend.{hook}({str(out)!r})"
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=sources,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


@pytest.mark.process
def test_an_sdist_has_all_that_the_native_build_needs(sources: Path) -> None:
    shutil.copytree(ROOT / "csrc", sources / "csrc")
    shutil.copy(ROOT / "constraints.txt", sources)
    done = build(sources, "build_sdist", DTM_FAST_NATIVE="OFF")
    assert done.returncode == 0, done.stderr
    (made,) = (sources.parent / "out").glob("*.tar.gz")
    with tarfile.open(made) as opened:
        inside = {name.partition("/")[2] for name in opened.getnames()}
    needed = {str(each.relative_to(ROOT)) for each in (ROOT / "csrc").rglob("*.*")}
    assert len(needed) > 100
    assert needed | {"CMakeLists.txt", "setup.py", "pyproject.toml", "dtm_fast/py.typed"} <= inside


@pytest.mark.process
def test_nothing_of_an_earlier_build_is_installed(sources: Path) -> None:
    for old in ("build/lib/dtm_fast/renamed.py", "dtm_fast/_cpu.cpython-3.so", "dtm_fast/_cuda.cpython-3.so"):
        (sources / old).parent.mkdir(parents=True, exist_ok=True)
        (sources / old).write_text("")
    done = build(sources, "build_wheel", DTM_FAST_NATIVE="OFF")
    assert done.returncode == 0, done.stderr
    (made,) = (sources.parent / "out").glob("*.whl")
    names = zipfile.ZipFile(made).namelist()
    assert any("gpu_choices/" in name for name in names)
    assert not [name for name in names if name.endswith((".so", "renamed.py"))]
    done = build(sources, "build_editable", DTM_FAST_NATIVE="OFF")
    assert done.returncode == 0, done.stderr
    assert not list((sources / "dtm_fast").glob("*.so"))


@pytest.mark.process
def test_a_build_that_fails_says_what_to_do_and_shows_no_traceback(sources: Path) -> None:
    if shutil.which("cmake") is None:
        pytest.skip("no tools to build native code here")
    (sources / "CMakeLists.txt").write_text('message(FATAL_ERROR "no such thing")\n')
    done = build(sources, "build_wheel", DTM_FAST_CUDA="OFF")
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1].startswith("dtm-fast: dtm_fast._cpu cannot be built, see above; ")
    assert "Traceback" not in done.stderr
    for jobs in ("abc", "0", "-1"):
        done = build(sources, "build_wheel", DTM_FAST_CUDA="OFF", MAX_JOBS=jobs)
        assert done.stderr.splitlines()[-1] == f"MAX_JOBS={jobs}: expected a whole number of at least 1"


def test_a_misspelt_switch_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="DTM_FAST_NATIVE=YES: expected AUTO, ON or OFF"):
        extensions(monkeypatch, DTM_FAST_NATIVE="yes")
