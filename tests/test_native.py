"""The native module by itself: its own thread pool, its own checks, several callers at once."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from idm_fast.kernels import extension
from idm_fast.ops import group_norm_silu, philox_normal, use_backend

pytestmark = pytest.mark.skipif(extension.native is None, reason=str(extension.missing))

WITHOUT_TORCH = """
import importlib.util, os, sys
import numpy as np

spec = importlib.util.spec_from_file_location("_C", sys.argv[1])
native = importlib.util.module_from_spec(spec)
spec.loader.exec_module(native)
assert "torch" not in sys.modules
assert native.threads_runtime() == "std", native.threads_runtime()

def view(a):  # an [N, H, W, C] array seen as [N, C, H, W]
    n, h, w, c = a.shape
    return a.ctypes.data, 0, (n, c, h, w), (h * w * c, 1, w * c, c)

x = np.random.default_rng(0).standard_normal((3, 64, 64, 32), dtype=np.float32)

def run(threads):
    out = np.full_like(x, np.nan)
    native.group_norm_silu(view(x), view(out), *[None] * 9, 8, 1e-5, True, threads)
    return out

first = run(1)
assert np.isfinite(first).all()
for threads in (2, 3, 5, 2) * 20 + (24, 2):  # a pool that grows
    assert (run(threads) == first).all(), threads
if os.fork() == 0:  # a child has no workers and must not wait for them
    os._exit(0 if (run(2) == first).all() else 1)
assert os.wait()[1] == 0
"""


def test_own_thread_pool() -> None:
    """Without torch in the process there is no OpenMP runtime to share."""
    assert extension.native is not None
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, str(extension.native.__file__)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


def script(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


FORK_AFTER_USE = """
import os, signal, torch
from idm_fast.ops import group_norm_silu, philox_normal

torch.set_num_threads(2)
x = torch.randn(2, 64, 32, 32).contiguous(memory_format=torch.channels_last)
expected = group_norm_silu(x, 8)
child = os.fork()
if child == 0:
    signal.alarm(30)  # ends a child that waits for workers it has not got
    y = group_norm_silu(x, 8)
    torch.set_num_threads(1)  # torch.equal would wait for them too
    os._exit(0 if torch.equal(y, expected) else 1)
status = os.waitpid(child, 0)[1]
assert status == 0, status
assert torch.equal(group_norm_silu(x, 8), expected)  # the parent has kept its workers
"""


def test_fork_after_use() -> None:
    """torch's own parallel operators hang in such a child; ours run alone there."""
    script(FORK_AFTER_USE)


FEWER_TASKS_THAN_THREADS = """
import os, torch
from idm_fast.ops import group_norm_silu

torch.set_num_threads(6)
big = torch.randn(1, 64, 64, 64).contiguous(memory_format=torch.channels_last)
few = torch.randn(1, 32, 32, 48).contiguous(memory_format=torch.channels_last)  # fewer blocks than threads

def workers():
    torch.nn.functional.silu(big)
    return set(os.listdir("/proc/self/task"))

before = workers()
group_norm_silu(few, 8)
assert workers() == before, (workers(), before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_torchs_workers_outlive_a_small_call() -> None:
    """libgomp ends the threads that a smaller team leaves out; torch would start them again at its next operator."""
    script(FEWER_TASKS_THAN_THREADS)


def test_callers_do_not_disturb_each_other() -> None:
    images = [torch.randn(2, 48, 20, 20).contiguous(memory_format=torch.channels_last) for _ in range(4)]

    def work(index: int) -> bool:
        with use_backend("cpu"):
            first = group_norm_silu(images[index % 4], 8)
            noise = philox_normal(torch.tensor([index]), (1, 3, 40, 40))
            return all(
                torch.equal(group_norm_silu(images[index % 4], 8), first)
                and torch.equal(philox_normal(torch.tensor([index]), (1, 3, 40, 40)), noise)
                for _ in range(20)
            )

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(8)))


def test_native_checks_for_itself() -> None:
    """Python has checked already; these keep a wrong call from writing outside a buffer."""
    native = extension.native
    assert native is not None
    x = torch.zeros(1, 8, 4, 4).contiguous(memory_format=torch.channels_last)
    view = extension.view
    rest = (None,) * 9
    with pytest.raises(ValueError, match="group_norm_silu: num_groups must divide the channels"):
        native.group_norm_silu(view(x), view(x), *rest, 3, 1e-5, True, 1)
    with pytest.raises(ValueError, match="group_norm_silu: x must be a float tensor in NHWC order"):
        native.group_norm_silu(view(torch.zeros(1, 8, 4, 4)), view(x), *rest, 2, 1e-5, True, 1)
    with pytest.raises(ValueError, match="group_norm_silu: out must be as x"):
        native.group_norm_silu(view(x), view(x[:, :, :2]), *rest, 2, 1e-5, True, 1)
    with pytest.raises(ValueError, match="group_norm_silu: x must be"):
        native.group_norm_silu(None, view(x), *rest, 2, 1e-5, True, 1)
    with pytest.raises(ValueError, match="philox_normal: seeds must be int64"):
        native.philox_normal(view(x), view(torch.zeros(1)), 0, 1)
    with pytest.raises(TypeError):
        native.philox_normal((1, 2, 3), view(torch.zeros(1)), 0, 1)


@pytest.mark.skipif(extension.native is None or extension.native.cuda_architectures != "", reason="built with CUDA")
def test_a_build_without_cuda_says_so() -> None:
    with pytest.raises(ImportError, match=r"built without CUDA.*IDM_FAST_CMAKE_ARGS=-DIDM_FAST_CUDA=ON"):
        extension.require_cuda()
