"""What only a CUDA device can show. ``pytest -m gpu`` runs this and, on a device, the matrix of test_ops.py."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from idm_fast.kernels import extension
from idm_fast.ops import OPS

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def device() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and torch sees none")
    return torch.device("cuda", torch.cuda.current_device())


def test_the_native_module_has_cuda_kernels() -> None:
    """On a machine that could run them, a build without them is a mistake (CMake says why it left them out)."""
    assert extension.native is not None, extension.missing
    assert extension.native.cuda_architectures == "sm_80 sm_90a"


@pytest.mark.parametrize("name", OPS)
def test_the_automatic_choice_is_a_kernel_of_ours(name: str, device: torch.device) -> None:
    for backend in ("triton", "cuda"):
        if backend in OPS[name].backends and torch.cuda.get_device_capability(device) >= (8, 0):
            assert OPS[name].why_not(backend, device, torch.float32) is None, backend


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer(tool: str) -> None:
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer was not found")
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", "--print-limit", "20"]
    # One allocation a tensor, so that what lies beyond it is nobody's.
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    script = [sys.executable, str(ROOT / "tests" / "sanitized_gpu.py")]
    done = subprocess.run([*command, *script], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "ran: " in done.stdout
