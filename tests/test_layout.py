"""The rules of the house: who may import whom, what every folder holds, how long a file may be."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from idm_fast.ops import OPS

ROOT = Path(__file__).resolve().parents[1]
KERNELS = ROOT / "kernels"
OP_FOLDERS = sorted(path.parent for path in KERNELS.glob("*/__init__.py"))
MAX_LINES = 400


def python_files(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def imports(path: Path) -> set[str]:
    """Dotted names that a file imports, anywhere in it; ``from a import b`` counts as a.b, which may be a module."""
    package = ["idm_fast", *path.relative_to(ROOT).parts[:-1]]
    if path.is_relative_to(ROOT / "idm_fast"):
        package = package[1:]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return found


def inside(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def test_ops_are_the_folders() -> None:
    assert sorted(OPS) == [folder.name for folder in OP_FOLDERS]


@pytest.mark.parametrize("folder", OP_FOLDERS, ids=lambda folder: folder.name)
def test_every_op_has_a_judge_and_cases(folder: Path) -> None:
    assert (folder / "reference.py").is_file()
    assert (folder / "cases.py").is_file()
    assert list(OPS[folder.name].backends)[-1] == "reference"


def test_every_native_op_has_a_python_side() -> None:
    native = {path.name for path in (ROOT / "csrc").iterdir() if path.is_dir()} - {"common"}
    assert native <= {folder.name for folder in OP_FOLDERS}


@pytest.mark.parametrize("path", python_files("kernels"), ids=lambda path: str(path.relative_to(ROOT)))
def test_kernels_import_only_themselves(path: Path) -> None:
    for name in imports(path):
        allowed = not inside(name, "idm_fast") or inside(name, "idm_fast.kernels") or inside(name, "idm_fast._C")
        assert allowed, name


def test_samplers_never_import_a_network() -> None:
    for path in python_files("idm_fast/diffusion"):
        above = ("models", "engine", "restorer", "faces", "training", "cli", "checkpoints")
        bad = [name for name in imports(path) if any(inside(name, f"idm_fast.{room}") for room in above)]
        assert not bad, f"{path.relative_to(ROOT)} imports {bad}"


def test_networks_import_nothing_above_them() -> None:
    for path in python_files("idm_fast/models"):
        above = ("diffusion", "engine", "restorer", "faces", "training", "cli")
        bad = [name for name in imports(path) if any(inside(name, f"idm_fast.{room}") for room in above)]
        assert not bad, f"{path.relative_to(ROOT)} imports {bad}"


def test_only_triton_kernels_import_triton() -> None:
    for path in python_files("idm_fast", "kernels", "benchmarks"):
        if path.name not in ("triton_kernel.py", "aot.py"):  # those kernels, and the gate that compiles them
            assert not any(inside(name, "triton") for name in imports(path)), path.relative_to(ROOT)


def test_no_torch_header() -> None:
    for path in (ROOT / "csrc").rglob("*.*"):
        headers = re.findall(r'#\s*include\s*[<"]([^>"]+)', path.read_text())
        assert not [h for h in headers if re.match(r"(torch|ATen|c10|caffe2)\b", h)], path.relative_to(ROOT)


def test_no_file_is_too_long() -> None:
    suffixes = {".py", ".pyi", ".cpp", ".h", ".cu", ".cuh"}
    for folder in ("csrc", "idm_fast", "kernels", "benchmarks", "tests"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in suffixes:
                lines = len(path.read_text().splitlines())
                assert lines <= MAX_LINES, f"{path.relative_to(ROOT)} has {lines} lines, at most {MAX_LINES}"
