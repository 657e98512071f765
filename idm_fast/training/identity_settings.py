"""Every setting of the training runs behind identity guidance: the identity recovery network's and the mask's."""

from __future__ import annotations

from dataclasses import dataclass

from idm_fast.errors import IdmFastError
from idm_fast.models.irn import IRN_PRESETS
from idm_fast.training.settings import RunSettings


@dataclass(frozen=True)
class IdentitySettings(RunSettings):
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
    workers: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.preset not in IRN_PRESETS:
            raise IdmFastError(f"preset must be one of {sorted(IRN_PRESETS)}, got {self.preset!r}")
        if self.workers < 0:
            raise IdmFastError(f"workers must be >= 0, got {self.workers}")
        if not 0 <= self.euclid < float("inf"):
            raise IdmFastError(f"euclid must be a number >= 0, got {self.euclid}")
        if self.precision == "fp16":  # no scaler looks after its gradients
            raise IdmFastError("precision must be fp32 or bf16 for an identity recovery network, got fp16")
