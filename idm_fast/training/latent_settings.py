"""Every setting of a latent prior's training run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from idm_fast.config import PRESETS
from idm_fast.errors import IdmFastError
from idm_fast.training.latent_loss import LatentLossWeights
from idm_fast.training.settings import FaceSettings


@dataclass(frozen=True)
class LatentPriorSettings(FaceSettings):
    """Of a prior over the latents of the VQGAN in the file ``vqgan``, which stays as it is.

    ``pure_noise``: share of items at the last time, where every walk starts. ``rollout``: share of items whose x_t is
    built from the model's own one-step answer instead of the truth. ``val_faces``: validation faces of the figures that
    each sheet brings.
    """

    vqgan: Path = Path()
    preset: str = "clr-prior-128"
    learning_rate: float = 6e-4
    pure_noise: float = 0.375
    rollout: float = 0.375
    val_faces: int = 24
    init_from: Path | None = None
    loss: LatentLossWeights = field(default_factory=LatentLossWeights)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.val_faces < 1:
            raise IdmFastError(f"val_faces must be >= 1, got {self.val_faces}")
        for name in ("pure_noise", "rollout"):
            if not 0 <= getattr(self, name) <= 1:
                raise IdmFastError(f"{name} must lie in [0, 1], got {getattr(self, name)}")


def priors() -> list[str]:
    """Names of the presets that can be trained so: on latents, shown the degraded face's, predicting x0."""
    return [
        name
        for name, c in sorted(PRESETS.items())
        if c.latent and c.unet.cond_channels == c.unet.in_channels and c.diffusion.prediction == "x0"
    ]
