"""Walks of a CLR-Face model, and what guidance and its mask do to validation faces."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from idm_fast.diffusion import Guidance, SamplerTable, Schedule, build_table, initial_noise, sample
from idm_fast.evaluation.metrics import psnr
from idm_fast.identity import IdentityGradient
from idm_fast.models.clr_face import ClrFace
from idm_fast.models.perceptual import Lpips
from idm_fast.models.recognition import Recognition
from idm_fast.training.degradation import degrade_level
from idm_fast.training.recovery import likeness
from idm_fast.training.sheet import save_columns

WAYS = ("unguided", "unmasked", "masked")
_BATCH = 8


def table_of(model: ClrFace) -> SamplerTable:
    """Of the prior's own solver and number of steps."""
    prior = model.config.prior
    return build_table(
        Schedule.from_config(prior.diffusion), prior.diffusion.prediction, prior.sampler, prior.steps,
        spacing=prior.spacing,
    )  # fmt: skip


def walk(
    model: ClrFace,
    table: SamplerTable,
    cond: Tensor,  # [N, D, h, w], of the degraded faces
    seeds: Tensor,  # int64 [N]
    guidance: Guidance | None = None,
    callback: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Restored latents [N, D, h, w] in the prior's unit, from pure noise."""
    start = initial_noise(seeds, cond.shape, cond.device)
    return sample(lambda x, t: model.prior(x, t, cond), table, start, seeds, guidance=guidance, callback=callback)


class GuidedValidation:
    """``faces`` [N, 3, S, S] in [-1, 1], degraded at the level "severe" by seeds 0, 1, ..., and walked to three
    pictures: without guidance, with it, and with it through the model's mask; the same noise each time.

    Without ``lpips`` its figures are left out.
    """

    def __init__(self, faces: Tensor, recognition: Recognition, lpips: Lpips | None) -> None:
        self.recognition, self.lpips, self.faces = recognition, lpips, faces
        self.degraded = torch.stack([degrade_level(face, "severe", seed) for seed, face in enumerate(faces)])

    @torch.no_grad()
    def restore(self, model: ClrFace, ways: tuple[str, ...] = WAYS) -> dict[str, Tensor]:
        """The restored faces by way, on the CPU."""
        c, table = model.config, table_of(model)
        interval = (c.guidance_interval[0], c.guidance_interval[1])
        device = next(model.parameters()).device
        made: dict[str, list[Tensor]] = {way: [] for way in ways}
        for first in range(0, len(self.degraded), _BATCH):
            y = self.degraded[first : first + _BATCH].to(device)
            seeds = torch.arange(first, first + len(y), device=device)
            cond, target = model.encode(y), model.irn(y, self.recognition)
            for way in ways:
                mask = model.mask() if way == "masked" else None
                gradient = IdentityGradient(
                    model.vqgan, self.recognition, target, mask, scale=c.guidance_scale, repeats=c.guidance_repeats
                )
                guidance = Guidance(gradient, c.guidance_scale, interval, c.guidance_every)
                latent = walk(model, table, cond, seeds, None if way == "unguided" else guidance)
                made[way].append(model.decode(latent).float().clamp(-1, 1).cpu())
        return {way: torch.cat(parts) for way, parts in made.items()}

    @torch.no_grad()
    def measure(self, restored: dict[str, Tensor]) -> dict[str, float]:
        """To the clean faces, by way: ``likeness`` of the embeddings, and the means of LPIPS and of PSNR in dB."""
        device = next(self.recognition.parameters()).device
        true = self.recognition.embed_aligned(self.faces.to(device))
        figures: dict[str, float] = {}
        for way, made in restored.items():
            embeddings = self.recognition.embed_aligned(made.to(device))
            figures |= {f"{name}_{way}": value for name, value in likeness(embeddings, true).to_dict().items()}
            if self.lpips is not None:
                figures[f"lpips_{way}"] = float(self.lpips(made.to(device), self.faces.to(device)).mean())
            figures[f"psnr_{way}"] = float(psnr(made, self.faces).mean())
        return figures

    def draw(self, restored: dict[str, Tensor], path: Path, count: int = 8) -> None:
        """Writes a sheet (PNG): a row a face, columns degraded, the ways in their order, clean."""
        rows = slice(None, None, max(1, len(self.faces) // count))
        columns = [self.degraded, *restored.values(), self.faces]
        save_columns([column[rows][:count] for column in columns], path)
