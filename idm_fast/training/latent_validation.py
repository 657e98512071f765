"""How a latent prior is doing: validation faces restored in one step and in four, figures and a sheet."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor

from idm_fast.config import ModelConfig
from idm_fast.diffusion import Schedule, build_table, initial_noise, sample
from idm_fast.evaluation.metrics import psnr
from idm_fast.models.perceptual import Lpips
from idm_fast.models.unet import UNet
from idm_fast.models.vqgan import Vqgan
from idm_fast.training.degradation import degrade_level
from idm_fast.training.sheet import save_columns

STEPS = (1, 4)
_BATCH = 8
Autocast = Callable[[], AbstractContextManager[None]]


class LatentValidation:
    """``faces`` [N, 3, S, S] in [-1, 1], degraded at the level "medium" by seeds 0, 1, ...; ``scale`` of the latents.

    Networks run under ``autocast``, figures are computed in float32; without ``lpips`` its own are left out.
    """

    def __init__(self, vqgan: Vqgan, scale: float, faces: Tensor, lpips: Lpips | None, autocast: Autocast) -> None:
        self.vqgan, self.scale, self.lpips, self._autocast = vqgan, scale, lpips, autocast
        self.device = next(vqgan.parameters()).device
        self.faces = faces
        self.degraded = torch.stack([degrade_level(face, "medium", seed) for seed, face in enumerate(faces)])
        self._known: dict[str, float] | None = None  # what does not depend on the prior

    def measure(self, prior: UNet, config: ModelConfig) -> tuple[dict[str, float], dict[int, Tensor]]:
        """(figures, restored faces by their number of steps). Figures are means: ``psnr_4`` in dB and ``lpips_4``
        (AlexNet) of four steps; ``_degraded`` of the degraded faces; ``_vqgan`` of the clean ones encoded and decoded:
        what the autoencoder itself loses.
        """
        if self._known is None:
            self._known = self._figures("degraded", self.degraded)
            self._known |= self._figures("vqgan", self._batches(lambda x, _: self.vqgan(x), self.faces))
        found: dict[str, float] = {}
        restored: dict[int, Tensor] = {}
        for steps in STEPS:
            restored[steps] = self.restore(prior, config, steps)
            found |= self._figures(str(steps), restored[steps])
        return found | self._known, restored

    @torch.no_grad()
    def restore(self, prior: UNet, config: ModelConfig, steps: int) -> Tensor:
        """The degraded faces, restored in ``steps`` steps of the preset's own solver, on the CPU."""
        table = build_table(
            Schedule.from_config(config.diffusion), config.diffusion.prediction, config.sampler, steps,
            spacing=config.spacing,
        )  # fmt: skip

        def restored(y: Tensor, seeds: Tensor) -> Tensor:
            cond = self.vqgan.encode(y).float() * self.scale
            start = initial_noise(seeds, cond.shape, self.device)
            latent = sample(lambda x, t: prior(x, t, cond), table, start, seeds)
            return self.vqgan.decode(latent / self.scale)

        return self._batches(restored, self.degraded)

    @torch.no_grad()
    def _batches(self, work: Callable[[Tensor, Tensor], Tensor], pictures: Tensor) -> Tensor:
        parts = []
        for first in range(0, len(pictures), _BATCH):
            batch = pictures[first : first + _BATCH].to(self.device)
            seeds = torch.arange(first, first + len(batch), device=self.device)
            with self._autocast():
                made = work(batch, seeds)
            parts.append(made.float().clamp(-1, 1).cpu())
        return torch.cat(parts)

    @torch.no_grad()
    def _figures(self, name: str, made: Tensor) -> dict[str, float]:
        found = {f"psnr_{name}": float(psnr(made, self.faces).mean())}
        if self.lpips is not None:
            pairs = zip(torch.split(made, _BATCH), torch.split(self.faces, _BATCH), strict=True)
            rows = [self.lpips(a.to(self.device), b.to(self.device)).cpu() for a, b in pairs]
            found[f"lpips_{name}"] = float(torch.cat(rows).mean())
        return found

    def draw(self, restored: dict[int, Tensor], path: Path, count: int = 8) -> None:
        """Writes a sheet (PNG): a row a face, columns degraded, restored in one step, in four, clean."""
        rows = slice(None, None, max(1, len(self.faces) // count))
        columns = [self.degraded, *(restored[steps] for steps in STEPS), self.faces]
        save_columns([column[rows][:count] for column in columns], path)
