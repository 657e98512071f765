"""CUDA attention with the keys cut into parts, on the CPU's twin of CUDA: the plan, and the sum of the parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from types import ModuleType

import pytest
import torch

from idm_fast.kernels.extension import view
from idm_fast.ops import attention, use_backend

H100 = 132  # multiprocessors


@pytest.fixture
def device(
    emulator: ModuleType, emulated_rows: Callable[[ModuleType], AbstractContextManager[None]]
) -> Iterator[ModuleType]:
    """A device so large that every case here is cut."""
    emulator.set_multiprocessors(H100)
    try:
        with emulated_rows(emulator), use_backend("cuda"):
            yield emulator
    finally:
        emulator.set_multiprocessors(4)
        emulator.set_reversed(False)


def inputs(length: int, keys: int, d: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, rows, 1, d, generator=generator).half() for rows in (length, keys, keys)]


def test_the_plan(device: ModuleType) -> None:
    """Blocks are of 32 queries; a part has two rounds of keys (64, or 32 of a wide head) or more, and none is empty."""
    splits = device.attention_cuda_splits
    assert splits(1, 256, 1, 512, 256) == 4  # 16 blocks of one head of 512, 8 rounds
    assert splits(1, 256, 3, 64, 256) == 1  # 4 rounds: a second kernel takes longer
    assert splits(1, 1024, 1, 64, 1024) == 4  # 32 blocks
    assert splits(4, 4096, 4, 64, 4096) == 1  # enough blocks
    assert splits(1, 5, 1, 64, 65 * 64) == 22  # of 3 rounds, where 32 parts of 2 and one over would do no better
    for keys in range(1, 3000, 61):
        count, rounds = splits(1, 8, 1, 64, keys), -(-keys // 64)
        assert (count - 1) * -(-rounds // count) < rounds, keys


@pytest.mark.parametrize(("length", "keys", "d"), [(5, 700, 40), (40, 520, 128), (3, 300, 264)])
def test_parts_make_the_whole(device: ModuleType, length: int, keys: int, d: int) -> None:
    q, k, v = inputs(length, keys, d)
    assert device.attention_cuda_splits(1, length, 1, d, keys) > 1
    y = attention(q, k, v)
    device.set_reversed(True)
    assert torch.equal(attention(q, k, v), y)
    with use_backend("reference"):
        torch.testing.assert_close(y, attention(q, k, v), rtol=2e-3, atol=2e-4)


def test_the_best_key_in_any_part(device: ModuleType) -> None:
    """Parts whose maximum is far behind weigh nothing; negative and zero scales; what is no number."""
    q, k, v = inputs(3, 700, 16)
    v = (torch.arange(700.0) / 8).half().reshape(1, 700, 1, 1).expand(1, 700, 1, 16)
    for best in (0, 300, 699):
        k = torch.full((1, 700, 1, 16), -6e4).half()
        k[0, best] = 6e4
        expected = torch.full((1, 3, 1, 16), best / 8).half()
        assert torch.equal(attention(q.abs() + 1, k, v.contiguous()), expected)
        assert torch.equal(attention(q.abs() + 1, -k, v.contiguous(), scale=-1.0), expected)
    flat = attention(q, k, v.contiguous(), scale=0.0)
    torch.testing.assert_close(flat, torch.full_like(flat, 699 / 16), rtol=1e-3, atol=0)
    q[0, 1, 0, 3] = float("nan")
    assert attention(q, k, v.contiguous()).isnan().all(dim=-1).tolist() == [[[False], [True], [False]]]


def test_workspace_is_checked(device: ModuleType) -> None:
    q, k, v = inputs(4, 700, 16)
    for shape, dtype in (
        ((2, 1, 4, 1, 17), torch.float32),
        ((2, 1, 3, 1, 18), torch.float32),
        ((2, 1, 4, 1, 18), torch.half),
    ):
        bad = torch.empty(shape, dtype=dtype)
        with pytest.raises(ValueError, match=r"workspace must be float32 \[splits, N, L, heads, d \+ 2\], contiguous"):
            device.attention_cuda(view(q), view(k), view(v), view(torch.empty_like(q)), view(bad), 1.0, 0)
