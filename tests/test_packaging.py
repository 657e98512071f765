"""How the package installs and imports: the guard of ``kernels``, life without the native module, versions."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import idm_fast
from idm_fast.kernels import extension

ROOT = Path(__file__).resolve().parents[1]


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if not key.startswith(("IDM_FAST", "PYTHON"))}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**env, **environment}, capture_output=True, text=True, timeout=120
    )


def test_kernels_refuses_the_wrong_name() -> None:
    done = python("import kernels")
    assert done.returncode == 1
    assert (
        "ImportError: this folder is the package idm_fast.kernels and must not be imported as 'kernels'" in done.stderr
    )


WITHOUT = """
import sys, warnings
sys.modules["idm_fast._C"] = None  # the import of a module that is not there
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import idm_fast.ops
    import idm_fast.kernels.group_norm_silu
    import torch
    x = torch.randn(2, 8, 4, 4).contiguous(memory_format=torch.channels_last)
    for _ in range(3):
        y = idm_fast.ops.group_norm_silu(x, 2)
        idm_fast.ops.philox_normal(torch.tensor([1]), (1, 3, 4, 4))
ours = [str(w.message) for w in caught if "idm_fast" in str(w.message)]
assert len(ours) == 1, ours
assert "runs without its native module" in ours[0], ours
assert torch.allclose(y, torch.nn.functional.silu(torch.nn.functional.group_norm(x, 2)), atol=1e-5)
assert idm_fast.ops.OPS["group_norm_silu"].automatic("cpu", torch.float32) == "torch"
reason = idm_fast.ops.OPS["group_norm_silu"].why_not("cpu", "cpu", torch.float32)
assert "the native module idm_fast._C is missing" in reason, reason
"""


def test_works_without_the_native_module_and_says_so_once() -> None:
    done = python(WITHOUT)
    assert done.returncode == 0, done.stderr


def test_environment_is_read() -> None:
    code = "from idm_fast.kernels.dispatch import forced_backends; print(forced_backends())"
    assert python(code, IDM_FAST_BACKEND="torch,reference").stdout.strip() == "('torch', 'reference')"
    done = python("from idm_fast.kernels.dispatch import forced_backends; forced_backends()", IDM_FAST_BACKEND="tpu")
    assert "backend must be one of = triton, cuda, cpu, xformers, torch, reference, got 'tpu'" in done.stderr


def test_a_wrong_instruction_set_is_an_error() -> None:
    if extension.native is None:
        return
    done = python("import idm_fast.kernels", IDM_FAST_CPU_ISA="mmx")
    assert done.returncode == 1
    assert "cpu_isa: name must be one that this machine runs" in done.stderr
    code = "from idm_fast.kernels import extension; print(extension.native.cpu_isa())"
    assert python(code, IDM_FAST_CPU_ISA="baseline").stdout.strip() == "baseline"


@pytest.mark.slow
def test_installs_without_a_compiler(tmp_path: Path) -> None:
    """The native module is optional, also in place, where setuptools copies what was built; unless it is asked for."""
    for module in ("setuptools", "cmake", "pybind11"):
        pytest.importorskip(module)
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "idm_fast").mkdir()
    for folder in ("kernels", "csrc"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    for required in ("0", "1"):
        env = {**os.environ, "CXX": str(tmp_path / "no-compiler"), "IDM_FAST_REQUIRE_NATIVE": required}
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == int(required), done.stderr
        assert not list(tmp_path.rglob("*.so"))
    assert "CalledProcessError" in done.stderr


def test_versions_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == idm_fast.__version__
    assert project["requires-python"] == ">=3.11,<3.14"
