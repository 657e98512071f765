"""Tensors of more than 2^31 elements: what each kernel does at their end. On the CPU the whole call runs; Triton's
interpreter and the emulated CUDA device run the last block of each grid, the one with the largest offsets.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from importlib import import_module
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from idm_fast.kernels import extension
from idm_fast.kernels.channel_stats import pieces
from idm_fast.kernels.philox_normal.reference import MASK, philox
from idm_fast.ops import (
    ChannelStats,
    channel_stats,
    dynamic_threshold,
    group_norm_silu,
    norm_coefficients,
    sampler_update,
    use_backend,
)

WINDOW = 4 * 2**20  # bytes that repeat
TAIL = 2 * WINDOW  # bytes at the end that are there once
NORESERVE = 0x4000  # MAP_NORESERVE, which Python 3.10 has no name for


def _needs_linux() -> None:
    if not sys.platform.startswith("linux") or sys.maxsize < 2**32:
        pytest.skip("needs Linux with 64-bit addresses")


def sparse(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A contiguous tensor of zeros of which only the pages that are touched take memory."""
    _needs_linux()
    size = math.prod(shape) * dtype.itemsize
    room = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE)
    room.madvise(mmap.MADV_HUGEPAGE)  # a read of what nobody wrote maps 2 MiB of the one page of zeros
    return torch.frombuffer(room, dtype=dtype).view(shape)


class Repeating:
    """``tensor``: contiguous; its memory is one window again and again, then ``TAIL`` bytes of its own.

    Whoever writes it all writes the window many times, so that only what is the same in each may be asked about.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        _needs_linux()
        size = math.prod(shape) * dtype.itemsize
        windows = -(-(size - TAIL) // WINDOW)
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        self._unmap, self._bytes = libc.munmap, windows * WINDOW + TAIL
        self._unmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        read_write = mmap.PROT_READ | mmap.PROT_WRITE
        reserved = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE
        self._begin = libc.mmap(None, self._bytes, 0, reserved, -1, 0)
        assert self._begin not in (None, ctypes.c_void_p(-1).value), os.strerror(ctypes.get_errno())
        file = os.memfd_create("huge")
        try:
            os.ftruncate(file, WINDOW + TAIL)
            flags = mmap.MAP_SHARED | 0x10 | 0x8000  # MAP_FIXED, MAP_POPULATE: a fault a page would take seconds
            for i in range(windows):
                assert libc.mmap(self._begin + i * WINDOW, WINDOW, read_write, flags, file, 0) is not None
            end = self._begin + windows * WINDOW
            assert libc.mmap(end, TAIL, read_write, flags, file, WINDOW) is not None
        finally:
            os.close(file)
        memory = (ctypes.c_char * size).from_address(self._begin)
        self.tensor = torch.frombuffer(memory, dtype=dtype).view(shape)
        flat = self.tensor.view(-1)
        self.window = flat[: WINDOW // dtype.itemsize]
        self.repeats = windows
        self.tail = flat[windows * WINDOW // dtype.itemsize :]  # what of the tensor lies in pages of its own

    def __enter__(self) -> Repeating:
        return self

    def __exit__(self, *_: object) -> None:
        self._unmap(self._begin, self._bytes)


# x0_hat = model_output; x = 2 x0_hat: what was in x does not matter, so it may be written again and again. With noise:
QUIET = torch.tensor([[0.0, 1.0, 0.0, 2.0, 0.0, 0.0, 0.0, 0.0]])
NOISY = torch.tensor([[0.0, 1.0, 0.0, 2.0, 0.0, 0.5, 0.0, 0.0]])
SEED = 2**40 + 17


@pytest.fixture(params=["triton", "cuda"])
def last_block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Only the last block of each grid runs, of Triton's interpreter or of the emulated CUDA device."""
    if request.param == "cuda":
        module: ModuleType = request.getfixturevalue("emulator")
        rows: Callable[[ModuleType], AbstractContextManager[None]] = request.getfixturevalue("emulated_rows")
        module.set_last_only(True)
        with rows(module):
            yield "cuda"
        module.set_last_only(False)
        return
    if torch.cuda.is_available():
        pytest.skip("Triton's interpreter is off where there is a device")
    interpreter = import_module("triton.runtime.interpreter")

    def last(*bounds: int) -> range:
        of_grid = sys._getframe(1).f_code.co_name == "__call__"  # GridExecutor's loops over the three axes
        return range(*bounds)[-1:] if of_grid else range(*bounds)

    monkeypatch.setattr(interpreter, "range", last, raising=False)
    # It copies every storage onto itself, all of it.
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *_: None)
    yield "triton"


@pytest.fixture
def native() -> Any:
    if extension.native is None:
        pytest.skip(str(extension.missing))
    return extension.native


def nhwc(tensor: Tensor) -> Tensor:
    return tensor.permute(0, 3, 1, 2)


def noise_at(element: int, count: int, step: int) -> Tensor:
    """The definition of the noise (philox_normal/reference.py) at elements ``element`` .. of one image."""
    i = torch.arange(element // 4, (element + count + 3) // 4)
    zero = torch.zeros_like(i)
    key = (zero[:1] + (SEED & MASK), zero[:1] + (SEED >> 32))
    u = [(w >> 8).double() * 2.0**-24 + 2.0**-25 for w in philox((i & MASK, i >> 32, zero + step + 1, zero), key)]
    normals = []
    for u1, u2 in ((u[0], u[1]), (u[2], u[3])):
        radius, angle = (-2 * u1.log()).sqrt(), 2 * torch.pi * u2
        normals += [radius * angle.cos(), radius * angle.sin()]
    return torch.stack(normals, 1).flatten()[element % 4 :][:count].float()


def stats_like(n: int, p: int, c: int) -> ChannelStats:
    """Statistics of mean 1 and variance 4."""
    partials = torch.ones(n, p, 2, c)
    partials[:, :, 1] = 4.0
    return ChannelStats(partials, torch.ones(p))


@pytest.mark.parametrize("skip", [False, True])
def test_group_norm_silu(last_block: str, skip: bool) -> None:
    n, c, h, w = 2, 32, 2**12, 2**13 + 1
    x, out = sparse((n, h, w, c), torch.bfloat16), sparse((n, h, w, c * (1 + skip)), torch.bfloat16)
    x[-1, -1, -40:] = torch.randn(40, c)
    stats = stats_like(n, 2, c)
    arguments: dict[str, Any] = {"stats": stats}
    if skip:
        arguments |= {"skip": nhwc(x), "skip_stats": stats}
    with use_backend(last_block):
        group_norm_silu(nhwc(x), 8, **arguments, out=nhwc(out))
    tail = x[-1, -1, -8:].float()
    expected = F.silu((tail - 1) / (4 + 1e-5) ** 0.5)
    torch.testing.assert_close(out[-1, -1, -8:].float(), torch.cat([expected] * (1 + skip), 1), rtol=2e-2, atol=2e-2)


def test_channel_stats(last_block: str) -> None:
    n, c, h, w = 65535, 33, 32, 32
    x = sparse((n, h, w, c), torch.bfloat16)
    x[-1] = torch.randn(h, w, c)
    room = ChannelStats(sparse((n, pieces(h * w), 2, c), torch.float32), torch.zeros(pieces(h * w)))
    with use_backend(last_block):
        channel_stats(nhwc(x), out=room)
    mean = x[-1].float().flatten(0, 1)[-64:].mean(0)
    last = 1 if last_block == "triton" else 8  # channels of the last block
    torch.testing.assert_close(room.partials[-1, -1, 0, -last:][-1:], mean[-1:], rtol=1e-4, atol=1e-4)


def test_norm_coefficients(last_block: str) -> None:
    n, p, c = 65537, 16, 1024
    stats = ChannelStats(sparse((n, p, 2, c), torch.float32), torch.full((p,), 2.0))
    stats.partials[-1, :, 0], stats.partials[-1, :, 1] = 3.0, 8.0
    out = sparse((n, 3, c), torch.float32)
    with use_backend(last_block):
        norm_coefficients(stats, 128, out=out)
    torch.testing.assert_close(out[-1, :, -1], torch.tensor([3.0, (4 + 1e-5) ** -0.5, 0.0]))


@pytest.mark.parametrize("factor", [1, 2])
def test_sampler_update(last_block: str, factor: int) -> None:
    n, c, h, w = 2, 3, 2**14, 2**15 - 2
    x, history = sparse((n, h, w, c), torch.float32), sparse((n, h, w, c), torch.float32)
    output = sparse((n, h, w, c), torch.bfloat16)
    target = sparse((n, h // factor, w // factor, c * factor**2 + 3), torch.bfloat16)
    output[-1, -1, -40:] = torch.randn(40, c)
    inputs = {"network_input": nhwc(target)[:, :-3], "unshuffle": factor}
    with use_backend(last_block):
        sampler_update(nhwc(x), nhwc(output), nhwc(history), NOISY, 0, torch.tensor([1, SEED]), **inputs)
    tail = output[-1, -1, -4:].float()
    assert torch.equal(history[-1, -1, -4:], tail)
    new = 2 * tail + 0.5 * noise_at(c * h * w - 4 * c, 4 * c, 0).view(4, c)
    torch.testing.assert_close(x[-1, -1, -4:], new, rtol=1e-5, atol=1e-5)
    last = target[-1, -1, -1, :-3].view(c, factor**2)[:, -1]
    torch.testing.assert_close(last.float(), new[-1], rtol=1e-2, atol=1e-2)


def test_dynamic_threshold(last_block: str) -> None:
    n, c, h, w = 2**16 + 1, 4, 64, 128
    x, output = sparse((n, h, w, c), torch.float32), sparse((n, h, w, c), torch.bfloat16)
    output[-1] = torch.linspace(1, 5, h * w * c).view(h, w, c)
    out = torch.zeros(n)
    with use_backend(last_block):
        dynamic_threshold(nhwc(x), nhwc(output), QUIET, 0, 0.5, out)
    assert out[-1] == output[-1].float().median()
    assert out[:-1].count_nonzero() == 0


def test_philox_normal(last_block: str, emulator: ModuleType) -> None:
    n, c, h, w = 2, 3, 2**14, 2**15 - 2
    out = sparse((n, h, w, c), torch.float32)
    seeds, elements = torch.tensor([1, SEED]), c * h * w
    if last_block == "cuda":
        emulator.philox_normal_cuda(extension.view(nhwc(out)), extension.view(seeds), 5, 0)
    else:
        module = import_module("idm_fast.kernels.philox_normal.triton_kernel")
        grid = (-(-elements // (4 * module.COUNTERS)), n)
        module.normal_kernel[grid](out, seeds, 5, elements, COUNTERS=module.COUNTERS)
    torch.testing.assert_close(out[-1].view(-1)[-9:], noise_at(elements - 9, 9, 5), rtol=1e-5, atol=1e-5)


def test_time_embedding(last_block: str) -> None:
    if last_block == "cuda":
        pytest.skip("has no CUDA kernel of its own")
    module = import_module("idm_fast.kernels.time_embedding.triton_kernel")
    rows, depth = 2**26 + 72, 32
    weight, out = sparse((rows, depth), torch.bfloat16), sparse((40, rows), torch.float32)
    weight[-8:] = torch.randn(8, depth)
    x = torch.randn(40, depth)
    module._linear(x, weight, None, out)
    torch.testing.assert_close(out[-8:, -8:], x[-8:] @ weight[-8:].float().T, rtol=1e-3, atol=1e-3)


def test_cpu_group_norm_silu_and_channel_stats(native: Any) -> None:
    n, c, h, w = 2, 32, 2**12, 2**13 + 1
    x = sparse((n, h, w, c), torch.bfloat16)
    x[-1, -1, -40:] = torch.randn(40, c)
    with use_backend("cpu"):
        stats = channel_stats(nhwc(x))
        piece = x[-1].flatten(0, 1)[-int(stats.counts[-1]) :].double()
        torch.testing.assert_close(stats.partials[-1, -1, 0].double(), piece.mean(0), rtol=1e-4, atol=1e-12)
        with Repeating((n, h, w, c), torch.bfloat16) as room:
            out = room.tensor
            group_norm_silu(nhwc(x), 8, eps=1.0, out=nhwc(out))
            assert out[-1, -1, -8:].allclose(F.silu(x[-1, -1, -8:]), rtol=2e-2, atol=2e-2)
            assert out[-1, -2, -1].abs().max() < 1e-3
            del out


def test_cpu_norm_coefficients(native: Any) -> None:
    n, p, c = 65, 16384, 1024
    stats = ChannelStats(sparse((n, p, 2, c), torch.float32), torch.full((p,), 2.0))
    stats.partials[-1, -1, 0] = float(p)
    with use_backend("cpu"):
        table = norm_coefficients(stats, 128)
    assert torch.equal(table[-1, 0], torch.ones(c))
    assert not table[:-1, 0].any()


@pytest.mark.slow
def test_cpu_sampler_update(native: Any) -> None:
    n, c, h, w = 2, 3, 2**14, 2**15 - 2
    shape = (n, h, w, c)
    output = sparse(shape, torch.bfloat16)
    output[-1, -1, -40:] = torch.randn(40, c)
    with Repeating(shape, torch.float32) as room, Repeating(shape, torch.float32) as other:
        x, history = room.tensor, other.tensor
        with use_backend("cpu"):
            sampler_update(nhwc(x), nhwc(output), nhwc(history), QUIET, 0, torch.tensor([1, SEED]))
        tail = output[-1, -1, -40:].float()
        assert torch.equal(history[-1, -1, -40:], tail)
        assert torch.equal(x[-1, -1, -40:], 2 * tail)
        del x, history


@pytest.mark.slow
def test_cpu_philox_normal(native: Any) -> None:
    n, c, h, w = 2**11 + 1, 4, 512, 512
    with Repeating((n, h, w, c), torch.float32) as room:
        seeds = torch.full((n,), SEED)
        native.philox_normal(extension.view(nhwc(room.tensor)), extension.view(seeds), 5, 1)
        found = room.tensor[-1].view(-1)[-90:].clone()
    torch.testing.assert_close(found, noise_at(4 * 512 * 512 - 90, 90, 5), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_cpu_dynamic_threshold(native: Any) -> None:
    n, c, h, w = 8193, 8, 128, 256
    x, output = sparse((n, h, w, c), torch.float32), sparse((n, h, w, c), torch.bfloat16)
    output[-1] = torch.linspace(1, 5, h * w * c).view(h, w, c)
    with use_backend("cpu"):
        out = dynamic_threshold(nhwc(x), nhwc(output), QUIET, 0, 0.5)
    assert out[-1] == output[-1].float().flatten().sort().values[(h * w * c - 1) // 2]
    assert (out[:-1] == 1).all()
