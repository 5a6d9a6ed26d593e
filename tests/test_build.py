"""The build: which extensions setup.py builds, and that no instruction set leaks into baseline code."""

import re
import runpy
import shutil
import subprocess
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


def test_a_misspelt_switch_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="DTM_FAST_NATIVE=YES: expected AUTO, ON or OFF"):
        extensions(monkeypatch, DTM_FAST_NATIVE="yes")
