"""The sampling loop: it follows its table, on every backend, and each image's noise is its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from idm_fast.diffusion import SOLVERS, SamplerTable, Schedule, build_table, initial_noise, noised_start, sample
from idm_fast.errors import IdmFastError
from idm_fast.kernels import BackendError, philox_normal, use_backend

COSINE = Schedule.continuous_cosine()
SEEDS = torch.tensor([3, -1, 2**40 + 7])
SHAPE = (3, 3, 8, 8)


def plain_network(x: Tensor, t: Tensor) -> Tensor:
    return (0.5 * x - 0.1).clamp(-1, 1) + 1e-4 * t[:, None, None, None]


def restore(seeds: Tensor, table: SamplerTable, **settings: Any) -> Tensor:
    return sample(plain_network, table, initial_noise(seeds, (len(seeds), *SHAPE[1:]), "cpu"), seeds, **settings)


@pytest.mark.parametrize("backend", ["reference", "torch", "cpu", "triton"])
@pytest.mark.parametrize("solver", ["heun", "dpmpp_2m_sde"])
def test_same_picture_on_every_backend_and_in_every_batch(backend: str, solver: str) -> None:
    table = build_table(COSINE, "x0", solver, 4, clamp=1.0)
    with use_backend("reference"):
        expected = restore(SEEDS, table)
    try:
        with use_backend(backend):
            batch = restore(SEEDS, table)
            again = restore(SEEDS, table)
            singles = [restore(SEEDS[i : i + 1], table) for i in range(len(SEEDS))]
    except BackendError as error:
        pytest.skip(str(error))
    assert torch.equal(batch, again)
    assert torch.equal(batch, torch.cat(singles))
    torch.testing.assert_close(batch, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_loop_follows_the_table(solver: str) -> None:
    table = build_table(Schedule.linear(), "v", solver, 6, clamp=1.0)
    times = table.times(3)
    start = initial_noise(SEEDS, SHAPE, "cpu")
    path: list[Tensor] = []
    before = start.clone()
    x = sample(plain_network, table, start, SEEDS, callback=lambda e, x, x0: path.append(torch.stack([x, x0])))
    exact, history = start.double(), start.double()
    for e, (k_x, k_out, a, b, c, s, clamp, _) in enumerate(table.rows.tolist()):
        x0 = (k_x * exact + k_out * plain_network(exact, times[e].double())).clamp(-clamp, clamp)
        exact = a * exact + b * x0 + c * history + s * philox_normal(SEEDS, SHAPE, e, "cpu").double()
        history = x0
        torch.testing.assert_close(path[e], torch.stack([exact, x0]).float(), rtol=0, atol=2e-5)
    assert torch.equal(start, before)
    assert torch.equal(x, path[-1][0])
    assert torch.equal(x, path[-1][1])  # the walk ends on x0_hat
    assert x.dtype == torch.float32
    assert x.is_contiguous(memory_format=torch.channels_last)


def test_seeds_make_the_picture() -> None:
    table = build_table(COSINE, "x0", "ddpm", 4)
    pictures = restore(torch.tensor([7, 7, 8]), table)
    assert torch.equal(pictures[0], pictures[1])
    assert not torch.allclose(pictures[0], pictures[2], atol=1e-2)
    first = initial_noise(SEEDS, (3, 3, 32, 32), "cpu")
    assert float(first.mean()) == pytest.approx(0, abs=0.05)
    assert float(first.std()) == pytest.approx(1, abs=0.05)


def test_network_dtype_reaches_the_network() -> None:
    seen = []

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        seen.append((x.dtype, x.is_contiguous(memory_format=torch.channels_last), t.dtype, list(t.shape)))
        return plain_network(x, t.to(x.dtype))

    table = build_table(COSINE, "x0", "ddim", 3)
    x = sample(denoise, table, initial_noise(SEEDS, SHAPE, "cpu"), SEEDS, network_dtype=torch.bfloat16)
    assert seen == [(torch.bfloat16, True, torch.float32, [3])] * 3
    torch.testing.assert_close(x, restore(SEEDS, table), rtol=0, atol=0.02)
    assert x.dtype == torch.float32


def test_a_start_in_the_middle_holds_the_image() -> None:
    image = torch.full(SHAPE, 0.5)
    table = build_table(COSINE, "x0", "ddim", 4, start=0.25)
    x = noised_start(image, table, SEEDS)
    expected = table.alpha_start * image + table.sigma_start * initial_noise(SEEDS, SHAPE, "cpu")
    torch.testing.assert_close(x, expected)
    assert table.network_time[0] == 250


@pytest.mark.parametrize(
    ("x", "seeds", "message"),
    [
        (torch.zeros(SHAPE), SEEDS.int(), r"seeds must be int64 \[N\] = \[3\], got torch.int32 \[3\]"),
        (torch.zeros(SHAPE), SEEDS[:2], r"seeds must be int64 \[N\] = \[3\], got torch.int64 \[2\]"),
        (torch.zeros(SHAPE[1:]), SEEDS, r"x must be a float \[N, C, H, W\], got torch.float32 \[3, 8, 8\]"),
        (torch.zeros(SHAPE, dtype=torch.uint8), SEEDS, r"x must be a float \[N, C, H, W\], got torch.uint8"),
        (torch.zeros(SHAPE), SEEDS.to("meta"), "seeds must be on the images' device = cpu, got meta"),
    ],
)
def test_wrong_tensors_are_named(x: Tensor, seeds: Tensor, message: str) -> None:
    table = build_table(COSINE, "x0", "ddim", 2)
    with pytest.raises(IdmFastError, match=message):
        sample(plain_network, table, x, seeds)
