"""Drives CMake, which describes the native build (see CMakeLists.txt).

Environment:
  DTM_FAST_NATIVE  AUTO (build when the tools are there), ON (it must build) or OFF (pure Python)
  DTM_FAST_CUDA    AUTO (build when nvcc is there), ON or OFF
  MAX_JOBS         compiler processes at a time; by default one per CPU
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.command.editable_wheel import editable_wheel

ROOT = Path(__file__).resolve().parent


def switch(name: str) -> str:
    """The value of an environment variable that is AUTO, ON or OFF."""
    value = os.environ.get(name, "").strip().upper() or "AUTO"
    if value not in ("AUTO", "ON", "OFF"):
        raise SystemExit(f"{name}={value}: expected AUTO, ON or OFF")
    return value


def why_not_native() -> str | None:
    """Why the native code cannot be built here, or None if it can."""
    if platform.machine().lower() not in ("x86_64", "amd64") or not sys.platform.startswith("linux"):
        return f"the native code is for x86-64 Linux, this is {platform.machine()} {sys.platform}"
    if shutil.which("cmake") is None:
        return "cmake is not installed"
    named = shlex.split(os.environ.get("CXX", ""))[:1]  # flags may follow
    if not any(shutil.which(compiler) for compiler in (*named, "c++", "g++", "clang++")):
        return "no C++ compiler (c++, g++, clang++ or $CXX) is installed"
    if shutil.which("ninja") is None and shutil.which("make") is None:
        return "neither ninja nor make is installed"
    return None


def jobs() -> str:
    """Compiler processes at a time."""
    value = os.environ.get("MAX_JOBS", "").strip() or str(os.cpu_count() or 1)
    if not value.isdecimal() or int(value) < 1:
        raise SystemExit(f"MAX_JOBS={value}: expected a whole number of at least 1")
    return value


def native_extensions() -> list[Extension]:
    """The extension modules to build: none, _cpu, or _cpu and _cuda."""
    native, cuda = switch("DTM_FAST_NATIVE"), switch("DTM_FAST_CUDA")
    if native == "OFF":
        if cuda == "ON":
            raise SystemExit("DTM_FAST_CUDA=ON needs native code, but DTM_FAST_NATIVE=OFF")
        return []
    reason = why_not_native()
    if reason is not None:
        if native == "ON" or cuda == "ON":
            raise SystemExit(f"dtm-fast: native code was asked for, but {reason}")
        print(f"*** dtm-fast: installing WITHOUT native code: {reason} ***", file=sys.stderr, flush=True)
        return []
    extensions = [Extension("dtm_fast._cpu", sources=[])]
    if cuda == "ON" or (cuda == "AUTO" and shutil.which(os.environ.get("CUDACXX", "nvcc")) is not None):
        extensions.append(Extension("dtm_fast._cuda", sources=[]))
    return extensions


class CMakeBuild(build_ext):
    """Builds each extension module as the CMake target of its name."""

    def build_extension(self, extension: Extension) -> None:
        """Configure (the second time costs nothing) and build one target."""
        import pybind11

        output = Path(self.get_ext_fullpath(extension.name)).resolve().parent
        folder = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        cuda = any(each.name == "dtm_fast._cuda" for each in self.extensions)
        arguments = [
            "-DDTM_FAST_PYTHON=ON",
            f"-DDTM_FAST_CUDA={'ON' if cuda else 'OFF'}",
            f"-DDTM_FAST_OUTPUT_DIR={output}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]
        ninja = shutil.which("ninja")
        if ninja is not None:
            arguments += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        target = ["--target", extension.name.rpartition(".")[2], "--parallel", jobs()]
        try:
            subprocess.run(["cmake", "-S", str(ROOT), "-B", str(folder), *arguments], check=True)
            subprocess.run(["cmake", "--build", str(folder), *target], check=True)
        except subprocess.CalledProcessError:
            raise SystemExit(
                f"dtm-fast: {extension.name} cannot be built, see above; DTM_FAST_CUDA=OFF installs without kernels "
                "for GPUs, DTM_FAST_NATIVE=OFF without native code"
            ) from None


class FreshBuild(build):
    """Puts nothing into a wheel that an earlier build has left."""

    def run(self) -> None:
        """Begin with an empty folder; CMake's own is another."""
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class EditableWheel(editable_wheel):
    """Leaves no module beside the sources that this installation does not have."""

    def run(self) -> None:
        """Remove them first."""
        wanted = {extension.name.rpartition(".")[2] for extension in self.distribution.ext_modules or ()}
        for module in (ROOT / "dtm_fast").glob("_c*.so"):
            if module.name.partition(".")[0] not in wanted:
                module.unlink()
        super().run()


setup(
    ext_modules=native_extensions(),
    cmdclass={"build": FreshBuild, "build_ext": CMakeBuild, "editable_wheel": EditableWheel},
)
