"""Every setting of an intrinsic training run; stored with its state, so that a resumed run is the same run."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from idm_fast.errors import IdmFastError
from idm_fast.training.losses import LossWeights


@dataclass(frozen=True)
class TrainSettings:
    """``steps``: optimiser steps of the whole run; the learning rate warms up, stays, and falls linearly to zero over
    the last ``decay_fraction``. ``pure_noise``: share of items at t = 1, where every chain starts. ``rollout``: share
    of items whose x_t is built from the model's own one-step answer instead of the truth, so that it learns to
    improve on itself as sampling will ask it to. ``min_native_px``: leave out crops enlarged from fewer pixels.
    """

    data: Path
    out: Path
    preset: str = "idm-128"
    steps: int = 20_000
    batch_size: int = 8
    learning_rate: float = 4e-4
    warmup: int = 200
    decay_fraction: float = 0.4
    weight_decay: float = 0.01
    grad_clip: float = 1.0
    ema_decay: float = 0.998
    pure_noise: float = 0.375
    rollout: float = 0.375
    precision: str = "bf16"
    min_native_px: int = 128
    init_from: Path | None = None
    seed: int = 0
    workers: int = 0
    save_every: int = 100
    sheet_every: int = 500
    loss: LossWeights = field(default_factory=LossWeights)

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "save_every", "sheet_every"):
            if getattr(self, name) < 1:
                raise IdmFastError(f"{name} must be >= 1, got {getattr(self, name)}")
        for name in ("seed", "workers", "warmup", "min_native_px", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise IdmFastError(f"{name} must be >= 0, got {getattr(self, name)}")
        for name in ("learning_rate", "grad_clip"):
            if not 0 < getattr(self, name) < float("inf"):
                raise IdmFastError(f"{name} must be a number above 0, got {getattr(self, name)}")
        for name in ("pure_noise", "rollout", "decay_fraction", "ema_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise IdmFastError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        if self.precision not in ("fp32", "bf16", "fp16"):
            raise IdmFastError(f"precision must be one of fp32, bf16, fp16, got {self.precision!r}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON and for the state file."""
        return {key: str(value) if isinstance(value, Path) else value for key, value in asdict(self).items()}

    def notes(self) -> dict[str, Any]:
        """``to_dict`` for a model file that others will read: folders by their names only, the run's own left out."""
        named = {"data": self.data.name, "init_from": self.init_from.name if self.init_from else None}
        return {key: value for key, value in (self.to_dict() | named).items() if key != "out"}

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of step ``step`` (0-based)."""
        decay = max(1, round(self.steps * self.decay_fraction))
        return self.learning_rate * min(1.0, (step + 1) / max(1, self.warmup), (self.steps - step) / decay)
