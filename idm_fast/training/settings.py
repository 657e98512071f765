"""Every setting of a training run; stored with its state, so that a resumed run is the same run."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from idm_fast.config import PRESETS, ModelConfig
from idm_fast.errors import IdmFastError
from idm_fast.training.losses import LossWeights


@dataclass(frozen=True)
class RunSettings:
    """What every kind of run has. ``steps``: optimiser steps of the whole run; the learning rate warms up, stays, and
    falls linearly to zero over the last ``decay_fraction``. ``min_native_px``: leave out crops enlarged from fewer
    pixels.
    """

    data: Path
    out: Path
    preset: str
    steps: int = 20_000
    batch_size: int = 8
    learning_rate: float = 4e-4
    warmup: int = 200
    decay_fraction: float = 0.4
    weight_decay: float = 0.01
    grad_clip: float = 1.0
    ema_decay: float = 0.998
    precision: str = "bf16"
    min_native_px: int = 128
    seed: int = 0
    save_every: int = 100
    sheet_every: int = 500

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "save_every", "sheet_every"):
            if getattr(self, name) < 1:
                raise IdmFastError(f"{name} must be >= 1, got {getattr(self, name)}")
        for name in ("seed", "warmup", "min_native_px", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise IdmFastError(f"{name} must be >= 0, got {getattr(self, name)}")
        for name in ("learning_rate", "grad_clip"):
            if not 0 < getattr(self, name) < float("inf"):
                raise IdmFastError(f"{name} must be a number above 0, got {getattr(self, name)}")
        for name in ("decay_fraction", "ema_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise IdmFastError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        if self.precision not in ("fp32", "bf16", "fp16"):
            raise IdmFastError(f"precision must be one of fp32, bf16, fp16, got {self.precision!r}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON and for the state file."""
        return {key: str(value) if isinstance(value, Path) else value for key, value in asdict(self).items()}

    def notes(self) -> dict[str, Any]:
        """``to_dict`` for a model file that others will read: folders by their names only, the run's own left out."""
        own = {item.name: getattr(self, item.name) for item in fields(self)}
        named = {key: value.name for key, value in own.items() if isinstance(value, Path)}
        return {key: value for key, value in (self.to_dict() | named).items() if key != "out"}

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of step ``step`` (0-based)."""
        decay = max(1, round(self.steps * self.decay_fraction))
        return self.learning_rate * min(1.0, (step + 1) / max(1, self.warmup), (self.steps - step) / decay)


@dataclass(frozen=True)
class FaceSettings(RunSettings):
    """Of a run over faces that ``workers`` processes of their own read and degrade; 0: the training process itself."""

    workers: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.workers < 0:
            raise IdmFastError(f"workers must be >= 0, got {self.workers}")


@dataclass(frozen=True)
class TrainSettings(FaceSettings):
    """Of a restorer. ``pure_noise``: share of items at t = 1, where every chain starts. ``rollout``: share of items
    whose x_t is built from the model's own one-step answer instead of the truth, so that it learns to improve on
    itself as sampling will ask it to.
    """

    preset: str = "idm-128"
    pure_noise: float = 0.375
    rollout: float = 0.375
    init_from: Path | None = None
    loss: LossWeights = field(default_factory=LossWeights)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("pure_noise", "rollout"):
            if not 0 <= getattr(self, name) <= 1:
                raise IdmFastError(f"{name} must lie in [0, 1], got {getattr(self, name)}")


@dataclass(frozen=True)
class GeneratorSettings(RunSettings):
    """Of an unconditional generator. Its loss w(t) |x0_hat - x0|^2 has the signal-to-noise ratio clamped to
    [``snr_min``, ``snr_max``] as weight w.
    """

    preset: str = "gen-64"
    steps: int = 2_500
    batch_size: int = 16
    learning_rate: float = 1e-3
    warmup: int = 50
    decay_fraction: float = 0.5
    ema_decay: float = 0.995
    min_native_px: int = 0
    sheet_every: int = 500
    snr_min: float = 0.3
    snr_max: float = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.snr_min <= self.snr_max < float("inf") or not self.snr_max > 0:
            raise IdmFastError(
                f"snr_min and snr_max must satisfy 0 <= snr_min <= snr_max and snr_max > 0, got {self.snr_min} and "
                f"{self.snr_max}"
            )


def generators() -> list[str]:
    """Names of the presets that a generator run can train: no condition, and an answer that t = 1 does not break."""

    def fits(c: ModelConfig) -> bool:
        u = c.unet
        plain = not u.cond_channels and not u.num_classes and u.out_channels == u.in_channels
        return plain and c.diffusion.prediction != "eps"

    return [name for name, config in sorted(PRESETS.items()) if fits(config)]
