"""The CPU kernels, and the CUDA kernels on the CPU, under the address and undefined-behaviour sanitizers.

Tensors come from malloc, so a read or write beyond one is found, in a CUDA kernel too.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from idm_fast.kernels import extension
from idm_fast.ops import OPS

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[1]
# What the address sanitizer sees anyway is left out: those checks at every load treble the time to compile.
FLAGS = (
    "-g1 -fsanitize=address,undefined -fno-sanitize=null,object-size,vptr,pointer-overflow -fno-sanitize-recover=all"
    " -fno-omit-frame-pointer"
)


@pytest.fixture(scope="module")
def libasan() -> str:
    """The address sanitizer's library, which must be in the process before anything allocates."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("no C++ compiler found: c++ (or what CXX names)")
    done = subprocess.run([compiler, "-print-file-name=libasan.so"], capture_output=True, text=True)
    if not Path(done.stdout.strip()).is_absolute():
        pytest.skip(f"{compiler} has no libasan.so")
    return str(Path(done.stdout.strip()).resolve())


def run(libasan: str, *command: str) -> subprocess.CompletedProcess[str]:
    env = {
        **os.environ,
        "LD_PRELOAD": libasan,
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",  # Python never frees all
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONMALLOC": "malloc",
    }
    return subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True, timeout=1800)


def clean(libasan: str, backend: str, path: Path) -> None:
    done = run(libasan, str(ROOT / "tests" / "sanitized.py"), backend, str(path))
    assert done.returncode == 0, done.stdout[-300:] + done.stderr[-6000:]
    calls = int(done.stdout.splitlines()[-1].split()[1])
    assert calls > 0 or not any(backend in op.backends for op in OPS.values())


@pytest.mark.skipif(extension.native is None, reason=str(extension.missing))
def test_cpu_kernels_are_clean(libasan: str, build_module: Callable[..., Path]) -> None:
    # One set of vector code and the plain one: four take a quarter of an hour to compile so.
    best = extension.native.cpu_isa() if extension.native else ""
    options = (
        f"-DIDM_FAST_ISAS={best}",
        f"-DCMAKE_CXX_FLAGS={FLAGS}",
        "-DCMAKE_CXX_FLAGS_RELEASE=-O1",
        "-DIDM_FAST_CUDA=OFF",
    )
    clean(libasan, "cpu", build_module(ROOT, ROOT / "build" / "sanitized", "_C", *options))


BEYOND = """
import sys, torch
from pathlib import Path
from conftest import load
from idm_fast.kernels.extension import view
x, out = torch.ones(128), torch.zeros(64)
load("_E", Path(sys.argv[1])).wrong("beyond", view(x), view(out))
"""


def test_cuda_kernels_are_clean(libasan: str, build_module: Callable[..., Path]) -> None:
    source = ROOT / "csrc" / "common" / "cuda_on_cpu"
    path = build_module(source, ROOT / "build" / "cuda_on_cpu_sanitized", "_E", "-DIDM_FAST_SANITIZE=ON")
    done = run(libasan, "-c", f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r})\n{BEYOND}", str(path))
    assert "heap-buffer-overflow" in done.stderr, done.stderr[-3000:]  # it sees what it is there to see
    clean(libasan, "cuda", path)
