"""The published chains, step by step in float64, against their formulas written out from betas (and diffusers')."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from idm_fast.config import UNetConfig
from idm_fast.diffusion import (
    VARIANCES,
    SamplerTable,
    Schedule,
    build_table,
    initial_noise,
    noised_start,
    respace,
    sample,
)
from idm_fast.engine import Engine
from idm_fast.errors import IdmFastError
from idm_fast.kernels import philox_normal
from idm_fast.models.unet import UNet

Array = npt.NDArray[np.float64]
LINEAR = Schedule.linear()
SR3 = Schedule.linear(1e-6, 1e-2, 2000, conditioning="noise_level")
SEEDS = torch.tensor([3, -1])
SHAPE = (2, 3, 8, 8)


def betas_of(schedule: Schedule, kept: Array) -> Array:
    """The betas of the chain that keeps these training steps (rising)."""
    assert schedule.alphas_cumprod is not None
    bars = schedule.alphas_cumprod[kept.astype(int)]
    return 1 - bars / np.append(1.0, bars[:-1])


class Chain:
    """guided-diffusion's reverse process from its betas, as the papers write it: index 0 is the cleanest step."""

    def __init__(self, betas: Array) -> None:
        self.beta = betas
        self.bar = np.cumprod(1 - betas)
        self.bar_prev = np.append(1.0, self.bar[:-1])

    def x0(self, x: Array, eps: Array, i: int) -> Array:
        found: Array = np.clip((x - np.sqrt(1 - self.bar[i]) * eps) / np.sqrt(self.bar[i]), -1, 1)
        return found

    def mean(self, x: Array, x0: Array, i: int) -> Array:
        """DDPM, eq. 7."""
        rest = 1 - self.bar[i]
        of_x0 = np.sqrt(self.bar_prev[i]) * self.beta[i] / rest
        of_x = np.sqrt(1 - self.beta[i]) * (1 - self.bar_prev[i]) / rest
        return np.asarray(of_x0 * x0 + of_x * x)

    def variance(self, kind: str, v: Array, i: int) -> Array:
        small = self.beta[i] * (1 - self.bar_prev[i]) / (1 - self.bar[i])
        if kind != "learned":
            return np.full_like(v, small if kind == "small" else self.beta[i])
        f = (v + 1) / 2
        return np.asarray(np.exp(f * np.log(self.beta[i]) + (1 - f) * np.log(small)))

    def ancestral(self, kind: str, x: Array, eps: Array, v: Array, noise: Array, i: int) -> Array:
        mean = self.mean(x, self.x0(x, eps, i), i)
        return mean if i == 0 else mean + np.sqrt(self.variance(kind, v, i)) * noise

    def ddim(self, eta: float, x: Array, eps: Array, noise: Array, i: int) -> Array:
        """DDIM, eq. 12 and 16, with eps taken anew from the clipped x0."""
        x0 = self.x0(x, eps, i)
        eps = (x - np.sqrt(self.bar[i]) * x0) / np.sqrt(1 - self.bar[i])
        deviation = eta * np.sqrt((1 - self.bar_prev[i]) / (1 - self.bar[i]) * (1 - self.bar[i] / self.bar_prev[i]))
        mean = np.sqrt(self.bar_prev[i]) * x0 + np.sqrt(np.maximum(1 - self.bar_prev[i] - deviation**2, 0)) * eps
        return mean if i == 0 else mean + deviation * noise


def network(x: Any, e: int) -> Any:
    """(eps, v) of the shape of x: smooth, and v beyond [-1, 1] now and then."""
    back = torch if isinstance(x, Tensor) else np
    return 0.5 * x + 0.3 * back.sin(3 * x + e), 1.3 * back.cos(2 * x - e)  # type: ignore[attr-defined]


def noise(e: int) -> Array:
    return philox_normal(SEEDS, SHAPE, e, "cpu").double().numpy()


def walked(table: SamplerTable, start: Array, until: int | None = None) -> list[Array]:
    """x after each evaluation, as the table says it."""
    x, path = start, []
    for e, (k_x, k_out, a, b, c, s, clamp, spread) in enumerate(table.rows[:until].tolist()):
        eps, v = network(x, e)
        x0 = np.clip(k_x * x + k_out * eps, -clamp, clamp)
        x = a * x + b * x0 + s * noise(e) + (c * np.exp(spread * v) * noise(e) if c else 0.0)
        path.append(x)
    return path


def start() -> Array:
    return initial_noise(SEEDS, SHAPE, "cpu").double().numpy()


# ---- guided-diffusion ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", VARIANCES)
@pytest.mark.parametrize("respacing", ["250", "ddim25", "10,15,20", "1000"])
@pytest.mark.parametrize("schedule", [LINEAR, Schedule.cosine()], ids=["linear", "cosine"])
def test_the_ancestral_chain_of_every_variance(kind: Any, respacing: str, schedule: Schedule) -> None:
    kept = respace(1000, respacing)
    chain = Chain(betas_of(schedule, kept))
    table = build_table(schedule, "eps", "ddpm", timesteps=kept[::-1], clamp=1.0, variance=kind)
    assert table.learned_variance == (kind == "learned")
    assert table.network_time.tolist() == kept[::-1].tolist()
    x = start()
    middle = len(kept) // 2
    for e in [*range(12), *range(middle - 2, middle + 2), *range(len(kept) - 12, len(kept))]:
        i = len(kept) - 1 - e
        eps, v = network(x, e)
        expected = chain.ancestral(kind, x, eps, v, noise(e), i)
        k_x, k_out, a, b, c, s, clamp, spread = table.rows[e].tolist()
        x0 = np.clip(k_x * x + k_out * eps, -clamp, clamp)
        got = a * x + b * x0 + (c * np.exp(spread * v) if kind == "learned" else s) * noise(e)
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-11)
        x = expected
    assert table.rows[-1, 4:6].tolist() == [0, 0]  # index 0 draws nothing


def test_respacing_strings() -> None:
    assert respace(1000, "ddim250").tolist() == list(range(0, 1000, 4))
    assert respace(1000, "250")[[0, 1, -2, -1]].tolist() == [0, 4, 995, 999]
    assert respace(300, "10,15,20")[[0, 9, 10, 24, 25, 44]].tolist() == [0, 99, 100, 199, 200, 299]
    # Betas of a respaced chain multiply up to the same signal.
    kept = respace(1000, "10,15,20")
    assert LINEAR.alphas_cumprod is not None
    np.testing.assert_allclose(np.cumprod(1 - betas_of(LINEAR, kept)), LINEAR.alphas_cumprod[kept.astype(int)])


@pytest.mark.parametrize(("kind", "theirs"), [("small", "fixed_small"), ("large", "fixed_large"), ("learned", "")])
def test_the_ancestral_chain_equals_diffusers(kind: Any, theirs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    diffusers = pytest.importorskip("diffusers")
    times = list(range(980, -1, -70))
    peer = diffusers.DDPMScheduler(variance_type=theirs or "learned_range")
    assert LINEAR.alphas_cumprod is not None
    peer.alphas_cumprod = torch.from_numpy(LINEAR.alphas_cumprod.copy())  # theirs is the same in float32
    peer.set_timesteps(timesteps=times)
    counter = itertools.count()
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, **__: torch.from_numpy(noise(next(counter)))
    )
    table = build_table(LINEAR, "eps", "ddpm", timesteps=times, clamp=1.0, variance=kind)
    x = start()
    for e, ours in enumerate(walked(table, x)):
        eps, v = (torch.from_numpy(part) for part in network(x, e))
        out = torch.cat([eps, v], dim=1) if kind == "learned" else eps
        expected = peer.step(out, times[e], torch.from_numpy(x)).prev_sample.numpy()
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-9)
        x = ours


# ---- DifFace ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_difface_starts_at_index_100_of_250(eta: float) -> None:
    kept = respace(1000, "ddim250")
    chain = Chain(betas_of(LINEAR, kept))
    table = build_table(LINEAR, "eps", "ddim", timesteps=kept[:100][::-1], noise_timestep=kept[100], eta=eta, clamp=1.0)
    assert (table.evaluations, table.network_time[0], table.network_time[-1]) == (100, 396, 0)
    estimate = np.clip(start()[..., ::-1] * 0.4, -1, 1)
    x = np.sqrt(chain.bar[100]) * estimate + np.sqrt(1 - chain.bar[100]) * noise(-1)
    ours = noised_start(torch.from_numpy(estimate.copy()), table, SEEDS)
    np.testing.assert_allclose(ours.numpy(), x, atol=1e-6)
    for e, got in enumerate(walked(table, x)):
        x = chain.ddim(eta, x, network(x, e)[0], noise(e), 99 - e)
        np.testing.assert_allclose(got, x, rtol=0, atol=1e-10)


# ---- SR3 -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("e", [0, 1, 765, 1997, 1998, 1999])
def test_sr3_steps(e: int) -> None:
    """Its table is padded with 1 and read at t + 1; its log variance is clipped, and its last step draws nothing."""
    betas = np.linspace(1e-6, 1e-2, 2000)
    bar = np.cumprod(1 - betas)
    padded = np.sqrt(np.append(1.0, bar))
    t = 1999 - e
    table = build_table(SR3, "eps", "ddpm", 2000, clamp=1.0)
    assert table.network_time[e] == pytest.approx(padded[t + 1], rel=1e-12)
    x = start()
    eps = network(x, e)[0]
    previous = padded[t] ** 2
    x0 = np.clip(np.sqrt(1 / bar[t]) * x - np.sqrt(1 / bar[t] - 1) * eps, -1, 1)
    mean = betas[t] * np.sqrt(previous) / (1 - bar[t]) * x0 + (1 - previous) * np.sqrt(1 - betas[t]) / (1 - bar[t]) * x
    log_variance = np.log(max(betas[t] * (1 - previous) / (1 - bar[t]), 1e-20))
    expected = mean + (noise(e) * np.exp(0.5 * log_variance) if t > 0 else 0.0)
    k_x, k_out, a, b, _, s, clamp, _ = table.rows[e].tolist()
    got = a * x + b * np.clip(k_x * x + k_out * eps, -clamp, clamp) + s * noise(e)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-10)


# ---- a learned variance on the way through the loop and the engine ----------------------------------------------


def learned_table(steps: int = 6) -> SamplerTable:
    return build_table(LINEAR, "eps", "ddpm", steps, clamp=1.0, variance="learned")


def test_the_loop_draws_what_the_network_says() -> None:
    table = learned_table()
    path: list[Tensor] = []

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        return torch.cat(network(x, len(path)), dim=1)

    begin = initial_noise(SEEDS, SHAPE, "cpu")
    sample(denoise, table, begin, SEEDS, callback=lambda e, x, x0: path.append(x.clone()))
    for got, expected in zip(path, walked(table, begin.double().numpy()), strict=True):
        torch.testing.assert_close(got.double(), torch.from_numpy(expected), rtol=0, atol=1e-4)
    assert table.stochastic
    small = build_table(LINEAR, "eps", "ddpm", 6, clamp=1.0)
    ignored = sample(lambda x, t: torch.cat([x, x * 0 + 9], dim=1), small, begin, SEEDS)  # v is read by nobody
    assert torch.equal(ignored, sample(lambda x, t: x.clone(), small, begin, SEEDS))


def six_channel_network(unshuffle: int, conditioned: bool) -> UNet:
    config = UNetConfig(
        image_size=16, model_channels=32, channel_mult=(1, 2), num_res_blocks=(1, 1), out_channels=6,
        unshuffle=unshuffle, cond_channels=3 if conditioned else 0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = UNet(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.xavier_normal_(parameter, gain=0.7)
    return model


@pytest.mark.parametrize("unshuffle", [1, 2])
@pytest.mark.parametrize("conditioned", [False, True])
def test_the_engine_equals_the_loop(unshuffle: int, conditioned: bool) -> None:
    model, table = six_channel_network(unshuffle, conditioned), learned_table(5)
    shape = (2, 3, 16, 16)
    begin = initial_noise(SEEDS, shape, "cpu")
    cond = torch.rand(shape).contiguous(memory_format=torch.channels_last) if conditioned else None
    expected = sample(lambda x, t: model(x, t, cond), table, begin, SEEDS)
    engine = Engine.compile(model, (2, 16, 16), table, dtype=torch.float32)
    for _ in range(2):  # the second time its history holds something
        torch.testing.assert_close(engine.run(begin, SEEDS, cond), expected, rtol=0, atol=2e-4)
    fixed = build_table(LINEAR, "eps", "ddpm", 5, clamp=1.0)
    other = Engine.compile(model, (2, 16, 16), fixed, dtype=torch.float32)
    assert other.launches == engine.launches - 2
    assert (other.run(begin, SEEDS, cond) - expected).abs().max() > 0.01
    with pytest.raises(IdmFastError, match="variance must be fixed, as the engine was compiled for, got learned"):
        other.use_table(table)


def test_a_network_without_a_variance_is_refused() -> None:
    begin = initial_noise(SEEDS, SHAPE, "cpu")
    with pytest.raises(IdmFastError, match="output must have 6 channels for a learned variance, got 3"):
        sample(lambda x, t: x.clone(), learned_table(), begin, SEEDS)
    model = UNet(UNetConfig(image_size=16, model_channels=32, channel_mult=(1,), num_res_blocks=(1,)))
    with pytest.raises(IdmFastError, match="must have 6 output channels for a learned variance, got 3"):
        Engine.compile(model, (2, 16, 16), learned_table(), dtype=torch.float32)
    with pytest.raises(IdmFastError, match="variance must be one of small, large, learned, got 'none'"):
        build_table(LINEAR, "eps", "ddpm", 5, variance="none")  # type: ignore[arg-type]
