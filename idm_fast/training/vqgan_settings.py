"""Every setting of a VQGAN's training run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from idm_fast.errors import IdmFastError
from idm_fast.training.settings import FaceSettings
from idm_fast.training.vqgan_loss import VqganLossWeights


@dataclass(frozen=True)
class VqganSettings(FaceSettings):
    """Of an autoencoder. ``degraded``: share of items that are degraded faces, since a restorer encodes those too.

    ``codebook_lead``: for so many steps the decoder sees latents that are not quantised, while the codes gather where
    the latents are. ``codebook_decay``, ``revive_below``, ``revive_every``: see codebook.py.
    """

    preset: str = "vq-face-128"
    learning_rate: float = 5e-4
    ema_decay: float = 0.995
    degraded: float = 0.125
    codebook_lead: int = 200
    codebook_decay: float = 0.99
    revive_below: float = 0.1
    revive_every: int = 20
    init_from: Path | None = None
    loss: VqganLossWeights = field(default_factory=VqganLossWeights)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.codebook_lead < 0:
            raise IdmFastError(f"codebook_lead must be >= 0, got {self.codebook_lead}")
        for name in ("degraded", "codebook_decay", "revive_below"):
            if not 0 <= getattr(self, name) < 1:
                raise IdmFastError(f"{name} must lie in [0, 1), got {getattr(self, name)}")
        if not self.revive_below > 0:
            raise IdmFastError(f"revive_below must be above 0, got {self.revive_below}")
        if self.revive_every < 1:
            raise IdmFastError(f"revive_every must be >= 1, got {self.revive_every}")
        if self.precision == "fp16":  # the picture's gradient would vanish in it
            raise IdmFastError("precision must be fp32 or bf16 for a VQGAN, got fp16")
