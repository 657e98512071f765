"""Trains an unconditional diffusion model: it makes faces from noise, as many and as good as its data set lets it.

The measure of a data set: the same network, steps and seeds on two sets tell which of them teaches better ("beyond
restoration", 2307.08996). Everything random follows from the seed and the item's position in the run.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from idm_fast.config import DiffusionConfig, ModelConfig, preset
from idm_fast.diffusion.parameterisation import x0_from_output
from idm_fast.diffusion.schedule import Schedule
from idm_fast.errors import IdmFastError
from idm_fast.files import atomic
from idm_fast.generator import Generator
from idm_fast.kernels import philox_normal
from idm_fast.models.unet import UNet
from idm_fast.training.loop import Loop
from idm_fast.training.pictures import Pictures
from idm_fast.training.settings import GeneratorSettings, generators

FloatArray = np.ndarray[Any, np.dtype[np.float64]]
_NOISE = 0  # stream of an item's noise


def generating(name: str) -> ModelConfig:
    """The preset ``name`` if this loop can train it: without a condition, predicting x0 or v (eps fails at t = 1)."""
    config, fit = preset(name), generators()
    if name not in fit:
        raise IdmFastError(
            f"preset must be a generator (no condition) that predicts x0 or v = one of {fit}, got {name!r}"
        )
    return config


@dataclass(frozen=True)
class DenoisingLoss:
    """Mean of w(t) |x0_hat - x0|^2 per pixel, w = alpha^2 / sigma^2 clamped to [low, high] (Min-SNR, 2303.09556)."""

    diffusion: DiffusionConfig
    low: float
    high: float

    def __call__(
        self,
        network: nn.Module,
        x0: Tensor,  # [N, 3, S, S] in [-1, 1]
        u: FloatArray,  # [N] times in [0, 1]
        seeds: Tensor,  # int64 [N], of the noise
        autocast: AbstractContextManager[None] | None = None,  # what the network runs in
    ) -> Tensor:
        schedule = Schedule.from_config(self.diffusion)
        alpha, sigma = (
            torch.from_numpy(part).float().to(x0.device)[:, None, None, None] for part in schedule.alpha_sigma(u)
        )
        t = torch.from_numpy(schedule.network_time(u)).float().to(x0.device)
        count, channels, height, width = x0.shape
        x_t = alpha * x0 + sigma * philox_normal(seeds, (count, channels, height, width), _NOISE, x0.device)
        with autocast or nullcontext():
            out = network(x_t, t)
        x0_hat = x0_from_output(self.diffusion.prediction, x_t, out.float(), alpha, sigma)
        weight = (alpha / sigma.clamp(min=1e-4)).square().flatten().clamp(self.low, self.high)
        return (weight * (x0_hat - x0).square().mean(dim=(1, 2, 3))).mean()


class GeneratorTrainer(Loop[ModelConfig, UNet]):
    """One run: ``GeneratorTrainer(settings).run()``. Resumes from ``settings.out / 'state.pt'`` when it is there.

    Raises ``IdmFastError`` before any work for data, settings or a state that do not fit.
    """

    def __init__(self, settings: GeneratorSettings) -> None:
        config = generating(settings.preset)
        self.settings = settings
        super().__init__(settings, config, lambda: UNet(config.unet))
        self.pictures = Pictures(settings.data, "train", config.unet.image_size, settings.min_native_px)
        self.loss = DenoisingLoss(config.diffusion, settings.snr_min, settings.snr_max)
        self.resume()

    def _steps(self) -> Iterator[dict[str, float]]:
        s, group = self.settings, self.group
        while self.step < s.steps:
            first = self._first()
            positions = range(first + group.rank, first + s.batch_size * group.size, group.size)
            yield self._step(self.pictures.batch(positions, s.seed).to(self.device), positions)

    def _step(self, x0: Tensor, positions: range) -> dict[str, float]:
        s, group = self.settings, self.group
        rng = np.random.default_rng((s.seed, 3, self.step))  # alike in every process
        # One time from each of as many equal parts of [0, 1]: the loss of a step varies less (2107.00630, app. I.1).
        whole = s.batch_size * group.size
        u = ((np.arange(whole) + rng.random()) / whole)[group.rank :: group.size]
        seeds = torch.tensor(positions, device=self.device) + ((s.seed % 2**22) << 40)
        torch.manual_seed(int(rng.integers(2**31)) + group.rank)  # of dropout
        self._set_rate()
        loss = self.loss(self.network, x0, u, seeds, self._autocast())
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), s.grad_clip)
        figures = {"loss": loss.item(), "grad_norm": norm.item()}
        if math.isfinite(figures["grad_norm"]):  # one bad batch must not end a run; the log shows it
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.ema.update(self.model, self.step)
        return figures

    def _draw(self, path: Path) -> None:
        generator = Generator(self.config, copy.deepcopy(self.ema.model), self.device, torch.float32, engine=False)
        draw_sheet(generator.generate(torch.arange(32)), path, columns=8)


def draw_sheet(images: Tensor, path: Path, columns: int) -> None:
    """Writes ``images`` [N, 3, S, S] in [-1, 1] in rows of ``columns`` to ``path``; PNG, or JPEG by its name."""
    count, _, size, _ = images.shape
    rows = math.ceil(count / columns)
    grid = torch.ones(rows * columns, 3, size, size)
    grid[:count] = images
    pixels = ((grid + 1) * 127.5 + 0.5).clamp(0, 255).byte().view(rows, columns, 3, size, size)
    picture = Image.fromarray(pixels.permute(0, 3, 1, 4, 2).reshape(rows * size, columns * size, 3).numpy())
    with atomic(path) as temporary:
        picture.save(temporary)
