"""The words of our CUDA: barriers, shuffles, tensor core fragments, asynchronous copies; and the mistakes it must find.

The same kernels run on the CPU's twin of CUDA and, where there is one, on a device.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch

from idm_fast.kernels import extension
from idm_fast.kernels.extension import cuda_stream, view


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def place(request: pytest.FixtureRequest) -> tuple[Any, str]:
    """(module, device): the twin on the CPU, the real kernels on a device."""
    if request.param == "cpu":
        return request.getfixturevalue("emulator"), "cpu"
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and torch sees none")
    try:
        return extension.require_cuda(), "cuda"
    except ImportError as error:
        pytest.skip(str(error))


def test_shuffles(place: tuple[Any, str]) -> None:
    module, device = place
    out = torch.full((32, 6), -1, dtype=torch.int32, device=device)
    module.selftest_shuffles(view(out), cuda_stream(out))
    for lane, row in enumerate(out.tolist()):
        assert row == [
            100 + lane * 3 % 32,
            100 + (lane ^ 5),
            100 + (lane - 3 if lane >= 3 else lane),
            100 + (lane + 7 if lane + 7 < 32 else lane),
            100 + (lane + 2 if lane % 8 < 6 else lane),
            sum(1 << i for i in range(0, 32, 3)) - (0 if sum(1 << i for i in range(0, 32, 3)) < 2**31 else 2**32),
        ]


@pytest.mark.parametrize("width", [1, 31, 32, 129, 1000])
def test_row_sums(place: tuple[Any, str], width: int) -> None:
    module, device = place
    x = torch.randn(7, width, generator=torch.Generator().manual_seed(0)).to(device)
    out = torch.full((7,), float("nan"), device=device)
    module.selftest_row_sums(view(x), view(out), cuda_stream(x))
    torch.testing.assert_close(out, x.double().sum(1).float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(16, 8, 16), (32, 24, 40), (16, 16, 8), (48, 8, 136)], ids=str)
def test_matmul(place: tuple[Any, str], shape: tuple[int, int, int], dtype: torch.dtype, transposed: bool) -> None:
    """K of 8 and 40 ends in the middle of a step: the copies must fill it with zeros."""
    module, device = place
    m, n, k = shape
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(m, k, generator=generator).to(dtype).to(device)
    b = torch.randn(k, n, generator=generator).to(dtype).to(device)
    laid_out = b if transposed else b.t().contiguous()
    out = torch.full((m, n), float("nan"), device=device)
    module.selftest_matmul(view(a), view(laid_out), view(out), transposed, cuda_stream(a))
    torch.testing.assert_close(out.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)


def run_wrong(emulator: ModuleType, mistake: str) -> torch.Tensor:
    x, out = torch.ones(128), torch.zeros(64)
    emulator.wrong(mistake, view(x), view(out))
    return out


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("left out", r"a block is stuck: 63 threads from 0 wait at __syncthreads \(wrong.cu:\d+\), 1 have returned"),
        ("apart", r"16 threads from 16 wait at __syncthreads .*, 16 threads from 0 wait at __syncwarp .*, 0 have"),
        ("mixed", r"lanes of one warp meet in __shfl_xor_sync and in __shfl_up_sync"),
        ("block", r"threads of a block must be a multiple of 32 up to 1024, got 48"),
        ("grid", r"grid must be at most 2\^31 - 1, 65535, 65535, got 1, 65536, 1"),
        ("shared", r"dynamic shared memory must be at most 232448 bytes, got 233472"),
    ],
)
def test_mistakes_are_errors(emulator: ModuleType, mistake: str, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        run_wrong(emulator, mistake)
    test_shuffles((emulator, "cpu"))  # and the next grid runs


def test_unwritten_shared_memory_is_nan(emulator: ModuleType) -> None:
    assert run_wrong(emulator, "unwritten")[:32].isnan().all()
    assert run_wrong(emulator, "no wait")[:32].isnan().all()


@pytest.mark.parametrize("mistake", ["race", "ahead"])
def test_a_race_shows_in_the_opposite_order(emulator: ModuleType, mistake: str) -> None:
    forward = run_wrong(emulator, mistake)
    emulator.set_reversed(True)
    try:
        backward = run_wrong(emulator, mistake)
    finally:
        emulator.set_reversed(False)
    assert not torch.equal(forward.nan_to_num(-1), backward.nan_to_num(-1))


def test_half_conversions_are_torchs(emulator: ModuleType) -> None:
    """Through a product with the identity: every finite float16 and bfloat16 survives the twin's conversions."""
    for dtype in (torch.float16, torch.bfloat16):
        patterns = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
        a = torch.where(patterns.isfinite(), patterns, 0).reshape(-1, 16)
        identity, out = torch.eye(16, dtype=dtype), torch.full((a.shape[0], 16), float("nan"))
        emulator.selftest_matmul(view(a), view(identity), view(out), False, 0)
        assert torch.equal(out, a.float())
