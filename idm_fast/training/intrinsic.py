"""Trains a conditional diffusion restorer: the intrinsic part of IDM (2307.08996).

Everything random follows from the seed and the item's position in the run: a run that is stopped and resumed ends
with the same weights as one that was not (bit for bit on a CPU), and N processes see what one with N times the batch
would have seen.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from idm_fast.config import PRESETS, ModelConfig, preset
from idm_fast.diffusion.schedule import Schedule
from idm_fast.errors import IdmFastError
from idm_fast.models.unet import UNet
from idm_fast.training import distributed, sheet
from idm_fast.training.ema import Ema
from idm_fast.training.face_loop import FaceLoop
from idm_fast.training.losses import RestorationLoss
from idm_fast.training.noising import item_seeds, noised
from idm_fast.training.settings import TrainSettings
from idm_fast.training.state import Stateful
from idm_fast.training.warm_start import warm_start


def trainable(name: str) -> ModelConfig:
    """The preset ``name`` if this loop can train it: conditioned on a picture, predicting x0."""
    config = preset(name)
    fit = [key for key, c in PRESETS.items() if c.unet.cond_channels == 3 and c.diffusion.prediction == "x0"]
    if name not in fit:
        raise IdmFastError(f"preset must be a restorer that predicts x0 = one of {sorted(fit)}, got {name!r}")
    return config


class Trainer(FaceLoop[ModelConfig, UNet]):
    """One run: ``Trainer(settings).run()``. Resumes from ``settings.out / 'state.pt'`` when it is there.

    ``group``: processes that have joined already and stay together after the run. ``config``: that of the model file,
    where its name and sampling defaults are not the preset's; the network is the preset's.
    Raises ``IdmFastError`` before any work for data, settings or a state that do not fit.
    """

    settings: TrainSettings

    def __init__(
        self, settings: TrainSettings, group: distributed.Group | None = None, config: ModelConfig | None = None
    ) -> None:
        trained = trainable(settings.preset)
        self.settings = settings
        super().__init__(settings, config or trained, lambda: UNet(trained.unet), group)
        self.schedule = Schedule.from_config(trained.diffusion)
        if settings.init_from is not None and not self.state_file.exists():
            warm_start(self.model, settings.init_from)
            self.ema = Ema(self.model, settings.ema_decay)
        self.loss = RestorationLoss(settings.loss).to(self.device)
        self.critic_optimizer: torch.optim.Optimizer | None = None
        if self.loss.critic is not None:
            self.critic_optimizer = torch.optim.Adam(
                self.loss.critic.parameters(), lr=settings.loss.critic_rate, betas=(0.5, 0.99)
            )
        self.resume()

    def parts(self) -> dict[str, Stateful]:
        parts = super().parts()
        if self.critic_optimizer is not None and self.loss.critic is not None:
            parts |= {"critic": self.loss.critic, "critic_optimizer": self.critic_optimizer}
        return parts

    def _steps(self) -> Iterator[dict[str, float]]:
        for x0, y in self._pairs(self.config.unet.image_size):
            yield self._step(x0, y)

    def _draw(self, path: Path) -> None:
        sheet.draw(self.ema.model, self.config, self.settings.data, path)

    def _step(self, x0: Tensor, y: Tensor) -> dict[str, float]:
        s, group = self.settings, self.group
        rng = np.random.default_rng((s.seed, 3, self.step))  # alike in every process
        u = rng.random(x0.shape[0] * group.size)[group.rank :: group.size]
        side = max(1, x0.shape[-1] - s.loss.vgg_crop + 1)
        corner = (int(rng.integers(side)), int(rng.integers(side)))
        torch.manual_seed(int(rng.integers(2**31)) + group.rank)  # of dropout
        x_t, t, snr = self._noised(x0, y, u)
        self._set_rate()
        with self._autocast():
            terms = self.loss(self.network(x_t, t, y), x0, snr, corner, self.step)
        total = torch.stack(list(terms.values())).sum()
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(total).backward()  # type: ignore[no-untyped-call]
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), s.grad_clip)
        shown = {name: term.detach().float() for name, term in terms.items()} | {"grad_norm": norm}
        if self.critic_optimizer is not None:
            shown["critic"] = self._teach_critic(self.critic_optimizer)
        figures = dict(zip(shown, torch.stack(list(shown.values())).tolist(), strict=True))  # the one wait
        if math.isfinite(figures["grad_norm"]):  # one bad batch must not end a run; the log shows it
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.ema.update(self.model, self.step)
        return figures

    def _teach_critic(self, optimizer: torch.optim.Optimizer) -> Tensor:
        assert self.loss.critic is not None
        hinge = self.loss.hinge()  # float32: the heads are small
        optimizer.zero_grad(set_to_none=True)
        hinge.backward()  # type: ignore[no-untyped-call]
        self.group.average(self.loss.critic)
        if hinge.isfinite():
            optimizer.step()
        return hinge.detach()

    def _noised(self, x0: Tensor, y: Tensor, u: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """x_t, the network's time and the SNR of a batch; the first items start from pure noise, the last roll out."""
        s, group, count = self.settings, self.group, len(x0)
        times = u.copy()
        times[: round(s.pure_noise * count)] = 1.0
        seeds = item_seeds(self._first() + group.rank, count, group.size, s.seed)
        with self._autocast():
            return noised(self.schedule, times, x0, y, seeds, self.model, round(s.rollout * count))
