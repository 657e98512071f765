"""A table of betas as a file stores it (rounded to float32), as the settings that made it."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from idm_fast.config import DiffusionConfig, Prediction
from idm_fast.diffusion import Schedule
from idm_fast.errors import IdmFastError

_ROUNDING = 2e-6  # of the largest beta: float32 tables, some of them computed in float32 too
_MOST = 1_000_000


def from_betas(where: str, betas: Tensor, prediction: Prediction = "eps", noise_level: bool = False) -> DiffusionConfig:
    """``linear``, ``scaled_linear`` or ``cosine`` where one of them gives ``betas`` [N], else the table itself."""
    if betas.ndim != 1 or not 1 <= betas.shape[0] <= _MOST:
        raise IdmFastError(f"{where}: betas must be a list of 1..{_MOST} numbers, got shape {tuple(betas.shape)}")
    table = betas.double().numpy()
    if not bool(np.all((table > 0) & (table < 1))):
        raise IdmFastError(f"{where}: betas must be inside (0, 1), got {table.min():g} .. {table.max():g}")
    n, ends = len(table), (_digits(table[0]), _digits(table[-1]))
    candidates = {
        "linear": np.linspace(*ends, n),
        "scaled_linear": np.linspace(ends[0] ** 0.5, ends[1] ** 0.5, n) ** 2,
        "cosine": _cosine_betas(n),
    }
    for schedule, made in candidates.items():
        if np.abs(made - table).max() <= _ROUNDING * table.max() and ends[0] <= ends[1]:
            first, last = ends if schedule != "cosine" else (1e-4, 0.02)
            return DiffusionConfig(schedule, prediction, n, first, last, noise_level)  # type: ignore[arg-type]
    kept = tuple(float(value) for value in np.cumprod(1 - table))
    return DiffusionConfig("table", prediction, n, noise_level=noise_level, alphas_cumprod=kept)


def _digits(value: float) -> float:
    """The number that a person wrote, of which ``value`` is the float32."""
    short = float(f"{value:.6g}")
    return short if np.float32(short) == np.float32(value) else float(value)


def _cosine_betas(n: int) -> Any:
    table = Schedule.cosine(n).alphas_cumprod
    assert table is not None  # a discrete schedule has one
    return 1 - table / np.concatenate([[1.0], table[:-1]])
