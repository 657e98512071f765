"""The noise: known answers, moments, and that it depends on seed, step and place alone."""

from __future__ import annotations

import math

import pytest
import torch

from idm_fast.kernels.philox_normal import reference
from idm_fast.ops import ContractError, philox_normal, sampler_update, use_backend

ONES = 0xFFFFFFFF
PI = ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0))


# Known-answer tests of Random123, the library of the paper's authors.
@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (*PI, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ],
)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, ...], words: tuple[int, ...]) -> None:
    found = reference.philox(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert tuple(int(word) for word in found) == words


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_is_standard_normal(backend: str) -> None:
    with use_backend(backend):
        noise = philox_normal(torch.tensor([1, 2]), (2, 3, 150, 151), step=4)
    sample = noise.double().flatten()
    n = sample.numel()
    assert abs(sample.mean()) < 5 / math.sqrt(n)
    assert abs(sample.var() - 1) < 5 * math.sqrt(2 / n)
    assert abs((sample**3).mean()) < 5 * math.sqrt(15 / n)
    assert abs((sample**4).mean() - 3) < 5 * math.sqrt(96 / n)
    # Kolmogorov-Smirnov distance; 1.95 / sqrt(n) is the 0.1 % level.
    cdf = 0.5 * torch.erfc(-sample.sort().values / math.sqrt(2))
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    assert max((cdf - steps[:-1]).max(), (steps[1:] - cdf).max()) < 1.95 / math.sqrt(n)
    # Neighbours within a counter, between counters and between images are not correlated.
    for other in (sample[1:], sample[2:], sample[4:], sample[n // 2 :]):
        assert abs((sample[: other.numel()] * other).mean()) < 5 / math.sqrt(other.numel())


def test_native_equals_reference_to_rounding() -> None:
    seeds = torch.tensor([0, -1, 2**62 + 5])
    for step in (-1, 0, 999):
        with use_backend("reference"):
            expected = philox_normal(seeds, (3, 3, 37, 41), step)
        assert torch.allclose(philox_normal(seeds, (3, 3, 37, 41), step), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_batch_equals_singles(backend: str) -> None:
    seeds = torch.tensor([5, 6, 7])
    with use_backend(backend):
        batch = philox_normal(seeds, (3, 3, 9, 5), step=2)
        for n in range(3):
            assert torch.equal(batch[n : n + 1], philox_normal(seeds[n : n + 1], (1, 3, 9, 5), step=2))
        assert not torch.equal(batch[0], batch[1])
        assert not torch.equal(batch, philox_normal(seeds, (3, 3, 9, 5), step=3))


def test_smaller_image_is_a_prefix_in_nhwc_order() -> None:
    """Element = (h * W + w) * C + c: the first rows of a taller image carry the same noise."""
    tall = philox_normal(torch.tensor([5]), (1, 3, 8, 6))
    assert torch.equal(tall[:, :, :3], philox_normal(torch.tensor([5]), (1, 3, 3, 6)))


def test_layout_does_not_change_the_noise() -> None:
    row = torch.tensor([[0, 0, 0, 0, 0, 1.0, 0, 0]])
    seeds = torch.tensor([11, 12])
    expected = philox_normal(seeds, (2, 3, 5, 7), step=0)
    for layout in (torch.channels_last, torch.contiguous_format):
        x, output, history = (torch.zeros(2, 3, 5, 7).contiguous(memory_format=layout) for _ in range(3))
        sampler_update(x, output, history, row, 0, seeds)
        assert torch.allclose(x, expected, rtol=0, atol=1e-5)


def test_defaults_of_torch_do_not_come_in() -> None:
    """Native code takes addresses: a buffer on the default device, of the default dtype, would be a crash."""
    seeds = torch.tensor([3])
    expected = philox_normal(seeds, (1, 3, 4, 4))
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            found = philox_normal(seeds, (1, 3, 4, 4))
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)


def test_refusals() -> None:
    with pytest.raises(ContractError, match=r"seeds must be of dtype = int64, got int32"):
        philox_normal(torch.zeros(1, dtype=torch.int32), (1, 3, 4, 4))
    with pytest.raises(ContractError, match=r"seeds must be \[N\] = \[2\], got \[1\]"):
        philox_normal(torch.zeros(1, dtype=torch.int64), (2, 3, 4, 4))
    with pytest.raises(ContractError, match=r"step must be .* got -2"):
        philox_normal(torch.zeros(1, dtype=torch.int64), (1, 3, 4, 4), step=-2)
