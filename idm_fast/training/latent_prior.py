"""Trains a prior over the latents of a frozen VQGAN, conditioned on the degraded face's latent (CLR-Face, 2402.06106).

Everything random follows from the seed and the item's position in the run, so a run that is stopped and resumed is the
same run, bit for bit on a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from idm_fast import checkpoints
from idm_fast.config import ModelConfig, preset
from idm_fast.diffusion.schedule import Schedule
from idm_fast.errors import IdmFastError
from idm_fast.latent_space import LatentSpace, check_fits
from idm_fast.models.perceptual import Lpips
from idm_fast.models.unet import UNet
from idm_fast.models.vqgan import Vqgan
from idm_fast.training.data import FaceFile, list_faces, load_crop
from idm_fast.training.ema import Ema
from idm_fast.training.face_loop import FaceLoop
from idm_fast.training.latent_loss import LatentLoss, chosen
from idm_fast.training.latent_settings import LatentPriorSettings, priors
from idm_fast.training.latent_validation import LatentValidation
from idm_fast.training.log import put_row
from idm_fast.training.noising import item_seeds, noised
from idm_fast.training.reconstruction import deviation
from idm_fast.training.sheet import faces_to_show
from idm_fast.training.state import Stateful
from idm_fast.training.warm_start import warm_start

_SCALED_BY = 64  # faces whose latents give the scale, where the VQGAN does not know its own


class _Latents:
    """The scale of the latents and whose they are, as part of a run's state: both must be the same to go on."""

    def __init__(self, space: LatentSpace, file: Path) -> None:
        self.space, self.file = space, file

    def state_dict(self) -> dict[str, Any]:
        return {"scale": self.space.config.latent_scale, "digest": self.space.digest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["digest"] != self.space.digest:
            raise IdmFastError(
                f"{self.file}: must be the VQGAN that the run began with = weights {state['digest'][:12]}, "
                f"got {self.space.digest[:12]}; give that one or another --out"
            )
        self.space = _scaled(self.space, float(state["scale"]))


class LatentPriorTrainer(FaceLoop[ModelConfig, UNet]):
    """One run: ``LatentPriorTrainer(settings).run()``. Resumes from ``settings.out / 'state.pt'`` when it is there.

    Raises ``IdmFastError`` before any work for data, settings, a VQGAN or a state that do not fit.
    """

    settings: LatentPriorSettings

    def __init__(self, settings: LatentPriorSettings) -> None:
        self.settings = settings
        if settings.preset not in priors():
            raise IdmFastError(f"preset must be a prior over latents = one of {priors()}, got {settings.preset!r}")
        config = preset(settings.preset)
        self.faces = list_faces(settings.data, "train", settings.min_native_px)
        loaded = checkpoints.load(settings.vqgan)
        if not isinstance(loaded.module, Vqgan):
            raise IdmFastError(f"{settings.vqgan}: must hold a VQGAN, got a {type(loaded.module).__name__}")
        check_fits(config, loaded.config, settings.vqgan)
        super().__init__(settings, config, lambda: UNet(config.unet))
        self.vqgan: Vqgan = loaded.module.requires_grad_(False).to(self.device)
        self.vqgan.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.schedule = Schedule.from_config(config.diffusion)
        self.loss = LatentLoss(settings.loss).to(self.device)
        if settings.init_from is not None and not self.state_file.exists():
            warm_start(self.model, settings.init_from)
            self.ema = Ema(self.model, settings.ema_decay)
        space = LatentSpace.of(self.vqgan)
        if loaded.config.latent_scale == 1 and not self.state_file.exists():
            space = _scaled(space, self._measured_scale(self.faces[:_SCALED_BY]))
        self._latents = _Latents(space, settings.vqgan)
        self._validation: LatentValidation | None = None
        self.resume()

    @property
    def scale(self) -> float:
        """What a latent is multiplied by to have about unit deviation."""
        return self._latents.space.config.latent_scale

    def parts(self) -> dict[str, Stateful]:
        return super().parts() | {"latents": self._latents}

    def _steps(self) -> Iterator[dict[str, float]]:
        for x0, y in self._pairs(self.vqgan.config.image_size):
            yield self._step(x0, y)

    def _step(self, x0: Tensor, y: Tensor) -> dict[str, float]:
        s, group, count = self.settings, self.group, len(x0)
        rng = np.random.default_rng((s.seed, 3, self.step))  # alike in every process
        # Times at even angles arctan(sigma / alpha), as the walks will visit them.
        times = self.schedule.t_of_angle(np.pi / 2 * rng.random(count * group.size)[group.rank :: group.size])
        side = max(1, x0.shape[-1] - s.loss.vgg_crop + 1)
        corner = (int(rng.integers(side)), int(rng.integers(side)))
        seen = chosen(torch.from_numpy(rng.permutation(count)), self.loss.count(count)).to(self.device)
        torch.manual_seed(int(rng.integers(2**31)) + group.rank)  # of dropout
        z0, cond = self._encoded(torch.cat([x0, y])).chunk(2)
        times[: round(s.pure_noise * count)] = self.schedule.t_max
        seeds = item_seeds(self._first() + group.rank, count, group.size, s.seed)
        with self._autocast():
            x_t, t, snr = noised(self.schedule, times, z0, cond, seeds, self.model, round(s.rollout * count))
            z_hat = self.network(x_t, t, cond)
            terms = self.loss.latent(z_hat, z0, snr)
            if len(seen):
                terms |= self.loss.picture(self.vqgan, z_hat[seen] / self.scale, x0[seen], corner)
        self._set_rate()
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(torch.stack(list(terms.values())).sum()).backward()  # type: ignore[no-untyped-call]
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), s.grad_clip)
        error = (z_hat.detach().float() - z0).square().mean()
        shown = terms | {"error": error, "error_cond": (cond - z0).square().mean(), "grad_norm": norm}
        figures = dict(zip(shown, torch.stack([v.detach().float() for v in shown.values()]).tolist(), strict=True))
        if math.isfinite(figures["grad_norm"]):  # one bad batch must not end a run; the log shows it
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.ema.update(self.model, self.step)
        return figures

    @torch.no_grad()
    def _encoded(self, pictures: Tensor) -> Tensor:
        """Scaled latents, float32, not quantised."""
        with self._autocast():
            latent = self.vqgan.encode(pictures)
        return latent.float() * self.scale

    @torch.no_grad()
    def _measured_scale(self, faces: list[FaceFile]) -> float:
        side = self.vqgan.config.image_size
        latents = [self.vqgan.encode(load_crop(face.path, side)[None].to(self.device)) for face in faces]
        found = deviation(torch.cat(latents))
        if not 0 < found < math.inf:
            raise IdmFastError(f"{self.settings.vqgan}: latents must have a finite deviation above 0, got {found}")
        return round(1 / found, 4)

    def _draw(self, path: Path) -> None:
        if self._validation is None:
            faces = faces_to_show(self.settings.data, self.vqgan.config.image_size, self.settings.val_faces)
            if faces is None:
                return
            try:
                lpips = Lpips("alex").to(self.device)
            except IdmFastError:  # a run without a perceptual term needs no such weights
                lpips = None
            self._validation = LatentValidation(self.vqgan, self.scale, faces, lpips, self._autocast)
        figures, restored = self._validation.measure(self.ema.model, self.config)
        self._validation.draw(restored, path)
        put_row(self.settings.out / "validation.csv", self.step, figures)

    def _notes(self) -> dict[str, Any]:
        return super()._notes() | self._latents.space.to_notes()


def _scaled(space: LatentSpace, scale: float) -> LatentSpace:
    return LatentSpace(replace(space.config, latent_scale=scale), space.digest)
