"""Whose latents a model works on: the settings of its VQGAN and a digest of that one's weights, kept in its file."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from idm_fast.config import ModelConfig, from_dict
from idm_fast.config_vqgan import VqganConfig
from idm_fast.errors import IdmFastError
from idm_fast.models.vqgan import Vqgan


@dataclass(frozen=True)
class LatentSpace:
    """The latents of one VQGAN times ``config.latent_scale``. ``digest``: of its weights, see ``weights_digest``."""

    config: VqganConfig
    digest: str

    @classmethod
    def of(cls, vqgan: Vqgan, scale: float | None = None) -> LatentSpace:
        """That of ``vqgan``; ``scale`` in the place of its own."""
        config = vqgan.config if scale is None else replace(vqgan.config, latent_scale=scale)
        return cls(config, weights_digest(vqgan))

    @classmethod
    def noted(cls, notes: dict[str, Any], file: Path | str) -> LatentSpace:
        """What a latent model's ``notes`` say; ``file`` it came from, for errors. Raises ``IdmFastError``."""
        found = notes.get("vqgan")
        if not isinstance(found, dict) or not isinstance(found.get("digest"), str):
            raise IdmFastError(f"{file}: notes must say whose latents it works on (vqgan), got {sorted(notes)}")
        return cls(from_dict(VqganConfig, found.get("config"), f"{file}: vqgan"), found["digest"])

    def to_notes(self) -> dict[str, Any]:
        """``{"vqgan": ...}``, to be added to a model file's notes."""
        return {"vqgan": {"config": self.config.to_dict(), "digest": self.digest}}


def matched(notes: dict[str, Any], file: Path | str, vqgan: Vqgan, vqgan_file: Path | str) -> VqganConfig:
    """The VQGAN's settings with the scale that the latent model of ``file`` was trained at.

    notes: the latent model's; ``vqgan_file``: for errors. Raises ``IdmFastError`` where ``vqgan`` is not the one that
    the model was trained with.
    """
    space = LatentSpace.noted(notes, file)
    if _shape(space.config) != _shape(vqgan.config):
        mine, own = _shape(space.config).to_dict(), _shape(vqgan.config).to_dict()
        said = ", ".join(f"{key} = {value} (got {own[key]})" for key, value in mine.items() if own[key] != value)
        raise IdmFastError(f"{vqgan_file}: must be the VQGAN that {file} was trained with, which has {said}")
    digest = weights_digest(vqgan)
    if digest != space.digest:
        raise IdmFastError(
            f"{vqgan_file}: must be the VQGAN that {file} was trained with = weights {space.digest[:12]}, "
            f"got {digest[:12]}"
        )
    return space.config


def weights_digest(vqgan: Vqgan) -> str:
    """SHA-256 of all weights in fp16, as our files hold them, with names and shapes: the same from any file."""
    found = hashlib.sha256()
    for name, tensor in sorted(vqgan.state_dict().items()):
        found.update(json.dumps([name, list(tensor.shape)]).encode())
        found.update(tensor.detach().to("cpu", torch.float16).contiguous().numpy().astype("<f2").tobytes())
    return found.hexdigest()


def check_fits(prior: ModelConfig, vqgan: VqganConfig, vqgan_file: Path | str) -> None:
    """Raises ``IdmFastError`` where ``prior`` does not work on latents of the shape that ``vqgan`` makes."""
    u, side = prior.unet, vqgan.image_size // vqgan.factor
    expected = f"{u.in_channels} channels of {u.image_size} x {u.image_size}"
    if (u.in_channels, u.image_size) != (vqgan.embed_channels, side):
        raise IdmFastError(
            f"{vqgan_file}: must make latents of {expected} for {prior.name}, "
            f"got {vqgan.embed_channels} of {side} x {side}"
        )


def _shape(config: VqganConfig) -> VqganConfig:
    return replace(config, latent_scale=1.0, name="", dropout=0.0)
