"""Builds ``idm_fast/_C`` with CMake and maps the folder ``kernels`` to the package ``idm_fast.kernels``.

Everything declarative is in pyproject.toml. The native module is optional: without a C++ compiler the install goes on
and the package works on plain torch. ``IDM_FAST_REQUIRE_NATIVE=1`` turns a failed build into an error.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
KERNELS = ["idm_fast.kernels", *(f"idm_fast.kernels.{name}" for name in find_packages(str(ROOT / "kernels")))]


class CMakeBuild(build_ext):
    """Runs CMake in place of the compiler of setuptools."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        try:
            self._cmake(target)
        except (OSError, ImportError, subprocess.CalledProcessError) as error:
            if os.environ.get("IDM_FAST_REQUIRE_NATIVE") == "1":
                raise
            # A module of older sources would fail at the first call, or worse.
            target.unlink(missing_ok=True)
            if self.editable_mode:
                (ROOT / "idm_fast" / target.name).unlink(missing_ok=True)
            print(
                f"warning: idm_fast/_C was not built ({error}); the package works without it, slower", file=sys.stderr
            )

    def _cmake(self, target: Path) -> None:
        import pybind11

        build = (ROOT / self.build_temp / "cmake").resolve()
        # A cache that another path or interpreter configured is refused by CMake, so it goes.
        stamp = build / "interpreter.txt"
        if build.exists() and (not stamp.exists() or stamp.read_text() != f"{sys.executable}\n{ROOT}\n"):
            shutil.rmtree(build)
        build.mkdir(parents=True, exist_ok=True)
        stamp.write_text(f"{sys.executable}\n{ROOT}\n")
        configure = [
            _tool("cmake", "CMAKE_BIN_DIR"),
            f"-S{ROOT}",
            f"-B{build}",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DIDM_FAST_OUTPUT={target}",
            *os.environ.get("IDM_FAST_CMAKE_ARGS", "").split(),
        ]
        ninja = _tool("ninja", "BIN_DIR")
        if shutil.which(ninja):
            configure += ["-GNinja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        subprocess.run(configure, check=True)
        subprocess.run([configure[0], "--build", str(build), "--parallel", str(os.cpu_count() or 1)], check=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        built = build / "_C.so"
        fresh = target.with_suffix(".tmp")
        shutil.copyfile(built, fresh)
        os.replace(fresh, target)  # a running process keeps the file that it has mapped


def _tool(name: str, folder: str) -> str:
    """The tool inside its PyPI package, which the build requirements name, before an older one on the PATH."""
    try:
        return str(Path(getattr(import_module(name), folder)) / name)
    except (ImportError, AttributeError):
        return name


setup(
    packages=[*find_packages(str(ROOT), include=["idm_fast", "idm_fast.*"]), *KERNELS],
    package_dir={"idm_fast.kernels": "kernels"},
    ext_modules=[Extension("idm_fast._C", sources=[], optional=True)],
    cmdclass={"build_ext": CMakeBuild},
)
