"""Frozen settings of a whole CLR-Face model: its parts and the guidance it is at its best with; named presets."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from idm_fast.config import PRESETS, ModelConfig
from idm_fast.config_vqgan import VQGAN_PRESETS, VqganConfig
from idm_fast.errors import IdmFastError
from idm_fast.models.irn import IrnConfig


@dataclass(frozen=True)
class ClrFaceConfig:
    """Autoencoder, prior over its latents, identity recovery network, and how its walks are guided.

    ``prior`` works on latents times ``vqgan.latent_scale``: its channels and its image size are the latent's.
    ``guidance_scale`` >= 0: how far a step moves x0_hat along an identity gradient, in deviations of the latent and at
    most (see ``identity``); 0: never. ``guidance_repeats``: so many steps, each along a gradient of its own.
    ``guidance_interval``: the part of the way that is guided; ``guidance_every``: at which of its evaluations a
    gradient is computed (see ``diffusion.Guidance``). Raises ``IdmFastError`` for parts that do not fit.
    """

    name: str
    vqgan: VqganConfig
    prior: ModelConfig
    irn: IrnConfig
    guidance_scale: float = 0.0
    guidance_interval: tuple[float, ...] = (0.0, 1.0)
    guidance_every: int = 1
    guidance_repeats: int = 1

    def __post_init__(self) -> None:
        unet, channels = self.prior.unet, self.vqgan.embed_channels
        if not self.prior.latent:
            raise IdmFastError(f"prior must work on latents, got {self.prior.name}, which works on pictures")
        if self.vqgan.in_channels != 3 or self.vqgan.out_channels != 3:
            raise IdmFastError(
                f"vqgan must work on pictures = 3 channels, got {self.vqgan.in_channels} and {self.vqgan.out_channels}"
            )
        if (unet.in_channels, unet.cond_channels, unet.out_channels) != (channels,) * 3 or unet.num_classes:
            raise IdmFastError(
                f"prior must have the latent's channels, condition and no classes = {channels}, {channels}, {channels} "
                f"and 0, got {unet.in_channels}, {unet.cond_channels}, {unet.out_channels} and {unet.num_classes}"
            )
        if unet.image_size != self.latent_size:
            raise IdmFastError(f"prior must be of the latent's size = {self.latent_size}, got {unet.image_size}")
        if not 0 <= self.guidance_scale < math.inf:
            raise IdmFastError(f"guidance_scale must be >= 0, got {self.guidance_scale}")
        # A pair; JSON says no more than a list of numbers.
        if len(self.guidance_interval) != 2 or not 0 <= self.guidance_interval[0] < self.guidance_interval[1] <= 1:
            raise IdmFastError(f"guidance_interval must be 0 <= start < stop <= 1, got {self.guidance_interval}")
        for name in ("guidance_every", "guidance_repeats"):
            if getattr(self, name) < 1:
                raise IdmFastError(f"{name} must be >= 1, got {getattr(self, name)}")

    @property
    def image_size(self) -> int:
        """Side of a picture in pixels."""
        return self.vqgan.image_size

    @property
    def latent_size(self) -> int:
        """Side of a latent."""
        return self.vqgan.image_size // self.vqgan.factor

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


CLR_FACE_PRESETS: dict[str, ClrFaceConfig] = {
    # 6.9 M parameters, 14 MB in fp16. Training puts the trained VQGAN's scale of latents into it, and the guidance that
    # the mask was trained for.
    "clr-face-128": ClrFaceConfig("clr-face-128", VQGAN_PRESETS["vq-face-128"], PRESETS["clr-prior-128"], IrnConfig()),
}


def clr_face_preset(name: str) -> ClrFaceConfig:
    """The preset called ``name``; an unknown name raises ``IdmFastError`` with the list of known ones."""
    if name not in CLR_FACE_PRESETS:
        raise IdmFastError(f"preset must be one of {sorted(CLR_FACE_PRESETS)}, got {name!r}")
    return CLR_FACE_PRESETS[name]
