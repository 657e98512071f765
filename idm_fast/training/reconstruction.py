"""How much of a picture an autoencoder keeps: PSNR, LPIPS and the use of its codes, and a sheet to look at."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from idm_fast.evaluation.metrics import psnr
from idm_fast.models.perceptual import Lpips
from idm_fast.models.vqgan import Vqgan
from idm_fast.training.degradation import degrade_level
from idm_fast.training.sheet import save_columns


@dataclass(frozen=True)
class Reconstruction:
    """Means over ``count`` faces. ``psnr`` in dB and ``lpips`` (AlexNet) through the codes, ``psnr_as_is`` and
    ``lpips_as_is`` without them; ``codes``: how many different ones the faces chose; ``latent_deviation``: root mean
    square of the latents about their mean.
    """

    count: int
    psnr: float
    lpips: float
    psnr_as_is: float
    lpips_as_is: float
    codes: int
    latent_deviation: float

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


@torch.no_grad()
def measure(module: Vqgan, faces: Tensor, lpips: Lpips | None, batch: int = 16) -> Reconstruction:
    """``faces`` [N, 3, S, S] in [-1, 1] through ``module``; without ``lpips`` its figures are nan."""
    device = next(module.parameters()).device
    columns: list[list[Tensor]] = [[], [], [], []]
    codes, latents = [], []
    for x in torch.split(faces, batch):
        x = x.to(device)
        latent = module.encode(x)
        quantised, chosen = module.quantize(latent)
        codes.append(chosen.flatten())
        latents.append(latent)
        for index, z in enumerate((quantised, latent)):
            y = module.decode(z, quantize=False).clamp(-1, 1)
            columns[index].append(psnr(y, x))
            columns[2 + index].append(lpips(y, x) if lpips is not None else torch.full((len(x),), torch.nan))
    kept, as_is, lpips_kept, lpips_as_is = (float(torch.cat(column).mean()) for column in columns)
    return Reconstruction(
        len(faces),
        kept,
        lpips_kept,
        as_is,
        lpips_as_is,
        int(torch.bincount(torch.cat(codes)).count_nonzero()),
        deviation(torch.cat(latents)),
    )


def deviation(latents: Tensor) -> float:
    """Root mean square of latents [N, D, h, w] about the mean of their channel; its inverse is a ``latent_scale``."""
    return float((latents - latents.mean(dim=(0, 2, 3), keepdim=True)).square().mean().sqrt())


@torch.no_grad()
def draw(module: Vqgan, faces: Tensor, path: Path) -> None:
    """Writes a sheet (PNG): a row a face, columns the face, through the codes, without them, degraded, that through the
    codes."""
    device = next(module.parameters()).device
    degraded = torch.stack([degrade_level(face, "medium", seed) for seed, face in enumerate(faces)])
    x, y = faces.to(device), degraded.to(device)
    latent = module.encode(x)
    columns = [x, module.decode(latent), module.decode(latent, quantize=False), y, module.decode(module.encode(y))]
    save_columns(columns, path)
