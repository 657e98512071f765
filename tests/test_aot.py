"""Every kernel compiles for sm_80 and sm_90 without a device, spills nothing and takes no more than the tables say."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

from idm_fast.ops import OPS

ROOT = Path(__file__).resolve().parents[1]
TRITON_OPS = [name for name in OPS if (ROOT / "kernels" / name / "triton_kernel.py").exists()]


@pytest.fixture(scope="module")
def aot(load_file: Callable[[str, Path], ModuleType]) -> ModuleType:
    return load_file("aot", ROOT / "benchmarks" / "aot.py")


@pytest.mark.parametrize("name", TRITON_OPS)
def test_every_triton_kernel_declares_its_variants(name: str) -> None:
    variants = import_module(f"idm_fast.kernels.{name}.triton_kernel").AOT
    assert variants
    for variant in variants:
        assert list(variant.signature()) == variant.kernel.arg_names
    names = [variant.name for variant in variants]
    assert len(names) == len(set(names)), "two variants of one name"


LOG = """
ptxas info    : Compiling entry function '_ZN3idm44_GLOBAL__N__3786308f_11_selftest_cu_955003446kernelI6__halfLb1EEEvPKT_' for 'sm_80'
ptxas info    : Function properties for _ZN3idm44_GLOBAL__N__3786308f_11_selftest_cu_955003446kernelI6__halfLb1EEEvPKT_
    8 bytes stack frame, 4 bytes spill stores, 16 bytes spill loads
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized
ptxas info    : Used 40 registers, used 1 barriers, 128 bytes smem, 392 bytes cmem[0]
ptxas info    : Compiling entry function 'plain' for 'sm_80'
ptxas info    : Function properties for plain
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 7 registers, 360 bytes cmem[0]
"""  # noqa: E501


def test_reads_what_ptxas_says(aot: ModuleType) -> None:
    (first, spilling), (_, plain) = aot.parse_ptxas(LOG).items()
    assert spilling == (40, 128, 20, 8, ("wgmma.mma_async instructions are serialized",))
    assert plain == (7, 0, 0, 0, ())
    assert list(aot.demangled([first]).values()) == ["kernel<__half, true>"]


def test_what_is_a_fault(aot: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aot, "TABLES", tmp_path)
    good = aot.Row("k<1>", "sm_90a", 33, 1024, 0, 0)
    aot.write_table("op", {"nvcc": "13.0"}, [good])
    tools, budget = aot.read_table("op")
    assert (tools, budget) == ({"nvcc": "13.0"}, {good.key: good})
    assert aot.compare([good], budget, True) == []
    assert aot.compare([aot.Row("k<1>", "sm_90a", 40, 0, 0, 0)], budget, True) == []  # the same number is handed out
    more = aot.Row("k<1>", "sm_90a", 41, 0, 0, 0)
    assert aot.compare([more], budget, True) == ["k<1> on sm_90a takes 41 registers, the table has 33"]
    assert aot.compare([more], budget, False) == []  # another compiler
    assert aot.compare([aot.Row("k<1>", "sm_90a", 1, 0, 0, 8)], budget, True) != []  # an array on the stack
    assert aot.compare([aot.Row("k<2>", "sm_80", 1, 0, 0, 0)], budget, True) == ["k<2> on sm_80 is not in the table"]
    assert aot.Row("k", "sm_80", 1, 0, 8, 0).faults() == ["spills 8 bytes"]
    assert aot.Row("k", "sm_80", 1, 170_000, 0, 0).faults() != []
    assert aot.Row("k", "sm_90", 1, 170_000, 0, 0).faults() == []


SPILLING = """
extern "C" __global__ void __launch_bounds__(1024, 2) wide(float* x) {  // 32 registers for 64 live values
  float v[64];
#pragma unroll
  for (int i = 0; i < 64; ++i) v[i] = x[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 64; ++i) x[i * 1024 + 1023 - threadIdx.x] = v[i] * v[63 - i];
}
"""


def test_a_real_spill_is_a_fault(aot: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the compiler writes today is still what is read."""
    if (nvcc := aot.find_nvcc()) is None:
        pytest.skip("nvcc was not found")
    monkeypatch.setattr(aot, "ROOT", tmp_path)
    monkeypatch.setattr(aot, "CACHE", tmp_path / "cache")
    (tmp_path / "wide.cu").write_text(SPILLING)
    _, (row,) = aot.compile_cuda(nvcc, tmp_path / "wide.cu", "sm_80", False)
    assert (row.kernel, row.registers) == ("wide", 32)
    assert row.spills > 0
    assert aot.compare([row], {row.key: row}, True) == [f"wide on sm_80 spills {row.spills} bytes"]


@pytest.mark.slow
def test_every_kernel_compiles_and_keeps_its_budget() -> None:
    """What has changed since the tables were written is compiled: minutes, if it is much."""
    pytest.importorskip("triton")
    env = {key: value for key, value in os.environ.items() if not key.startswith("TRITON")}
    command = [sys.executable, str(ROOT / "benchmarks" / "aot.py"), "--changed"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
