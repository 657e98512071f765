"""Every setting of the training runs behind identity guidance: the identity recovery network's and the mask's."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from idm_fast.errors import IdmFastError
from idm_fast.models.irn import IRN_PRESETS
from idm_fast.training.settings import FaceSettings


@dataclass(frozen=True)
class IdentitySettings(FaceSettings):
    """Of an identity recovery network. ``euclid``: weight of |recovered - true|^2 beside 1 - cos, which knows no
    lengths.
    """

    preset: str = "irn-128"
    steps: int = 3000
    batch_size: int = 32
    learning_rate: float = 2e-3
    warmup: int = 100
    decay_fraction: float = 0.7
    ema_decay: float = 0.99
    sheet_every: int = 250
    euclid: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.preset not in IRN_PRESETS:
            raise IdmFastError(f"preset must be one of {sorted(IRN_PRESETS)}, got {self.preset!r}")
        if not 0 <= self.euclid < float("inf"):
            raise IdmFastError(f"euclid must be a number >= 0, got {self.euclid}")
        if self.precision == "fp16":  # no scaler looks after its gradients
            raise IdmFastError("precision must be fp32 or bf16 for an identity recovery network, got fp16")


@dataclass(frozen=True)
class MaskLossWeights:
    """Weights of the terms of a latent mask's loss; 0 switches a term off, and its network is then not loaded.

    ``identity``: of 1 - cos between the guided picture's embedding and the clean face's. ``lpips`` (AlexNet) and ``l1``
    (per pixel of pictures in [-1, 1]): of the guided picture to the clean one, which keep what makes no identity; by
    far the largest, because a step moves the identity by far more than the picture.
    ``sparsity``: of the mask's mean.
    """

    identity: float = 1.0
    lpips: float = 30.0
    l1: float = 5.0
    sparsity: float = 0.002

    def __post_init__(self) -> None:
        for name in ("identity", "lpips", "l1", "sparsity"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise IdmFastError(f"loss: {name} must be a number >= 0, got {getattr(self, name)}")
        if not self.identity:
            raise IdmFastError(f"loss: identity must be above 0, got {self.identity}")


@dataclass(frozen=True)
class LatentMaskSettings(FaceSettings):
    """Of a latent mask, and of the whole CLR-Face model that the files ``vqgan``, ``prior`` and ``irn`` make with it.

    ``preset``: the whole model's name. ``guidance_scale``, ``guidance_interval``, ``guidance_every``,
    ``guidance_repeats``: what the mask is trained for, and the model's defaults. ``val_faces``: validation faces of the
    figures that each sheet brings.
    """

    vqgan: Path = Path()
    prior: Path = Path()
    irn: Path = Path()
    preset: str = "clr-face-128"
    steps: int = 150
    batch_size: int = 8
    learning_rate: float = 0.05
    warmup: int = 10
    decay_fraction: float = 0.7
    weight_decay: float = 0.0
    ema_decay: float = 0.95
    save_every: int = 25
    sheet_every: int = 50
    guidance_scale: float = 0.016
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    guidance_every: int = 1
    guidance_repeats: int = 4
    val_faces: int = 24
    loss: MaskLossWeights = field(default_factory=MaskLossWeights)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.val_faces < 1:
            raise IdmFastError(f"val_faces must be >= 1, got {self.val_faces}")
        if self.guidance_repeats < 1:
            raise IdmFastError(f"guidance_repeats must be >= 1, got {self.guidance_repeats}")
        if not 0 < self.guidance_scale < float("inf"):
            raise IdmFastError(f"guidance_scale must be a number above 0, got {self.guidance_scale}")
        if self.precision == "fp16":  # the gradients would vanish in it
            raise IdmFastError("precision must be fp32 or bf16 for a latent mask, got fp16")
