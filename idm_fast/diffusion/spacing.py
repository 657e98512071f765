"""Which times a sampler visits. All functions return falling times; the step after the last ends at sigma = 0.

Spacings, for N training steps and S sampling steps (names of 2305.08891, table 2; values equal diffusers'):

- ``trailing``: N-1 first, then every N/S, rounded. Starts on the noisiest step: the right one for few steps.
- ``leading``: 0, N//S, 2 (N//S), ... reversed. Starts below the noisiest step by almost one interval.
- ``linspace``: evenly from N-1 to 0, both included.
- ``uniform``: equal intervals of time that end on the clean image: ``trailing`` on a table; t = 1, 1 - 1/S, ..., 1/S
  on a continuous schedule.
- ``angle``: equal intervals of arctan(sigma / alpha), which is ``uniform`` on the cosine schedule: any other continuous
  schedule then walks the same noise levels. The linear VP-SDE at equal times spends half of four steps where alpha is
  below 0.06 and little can be told.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from idm_fast.config import Spacing as Spacing
from idm_fast.errors import IdmFastError

Array = npt.NDArray[np.float64]
SPACINGS: tuple[Spacing, ...] = ("trailing", "leading", "linspace", "uniform", "angle")
T_MIN = 1e-3  # last time of a continuous ``linspace``: the epsilon at which score SDE (2011.13456, app. C) stops


def discrete(n: int, steps: int, spacing: Spacing, start: float) -> Array:
    """[steps] falling indices inside the lowest round(start * n) of 0 .. n-1.

    Errors: ``IdmFastError`` for an unknown spacing, start outside (0, 1], or steps outside 1 .. round(start * n);
    ``angle`` would ask for the same index twice.
    """
    _check(steps, spacing, start)
    if spacing == "angle":
        raise IdmFastError("timesteps: spacing of a table must be trailing, leading, linspace or uniform, got angle")
    n_used = max(1, round(start * n))
    if steps > n_used:
        part = "" if start == 1 else f" (start {start:g} of {n})"
        raise IdmFastError(f"timesteps: steps must be at most the schedule's {n_used}{part}, got {steps}")
    if spacing == "leading":
        if steps == 1 and n_used > 1:
            raise IdmFastError("timesteps: spacing 'leading' needs at least 2 steps, got 1; use 'trailing'")
        return np.arange(steps, dtype=np.float64)[::-1] * (n_used // steps)
    if spacing == "linspace" and steps > 1:
        return np.round(np.linspace(0, n_used - 1, steps))[::-1].astype(np.float64)
    return np.round(n_used - np.arange(steps) * (n_used / steps)) - 1


def continuous(t_max: float, steps: int, spacing: Spacing, start: float) -> Array:
    """[steps] falling times inside (0, start * t_max]. Errors as ``discrete``; ``leading`` would evaluate at t = 0."""
    _check(steps, spacing, start)
    top = start * t_max
    if spacing == "leading":
        raise IdmFastError("timesteps: spacing of a continuous schedule must be trailing, uniform or linspace")
    if spacing == "linspace" and steps > 1:
        return np.linspace(top, min(T_MIN, top / steps), steps)
    return top * (steps - np.arange(steps, dtype=np.float64)) / steps


def respace(n: int, sections: str | Sequence[int]) -> Array:
    """A respaced chain in guided-diffusion's notation, as RISING indices.

    ``"ddim250"``: the one whole stride that gives 250 steps (DifFace: n = 1000 -> 0, 4, ..., 996).
    ``[10, 20]`` or ``"10,20"``: n is cut into equal sections and each section keeps that many evenly spaced steps.
    Walk it backwards: ``build_table(..., timesteps=respace(1000, "ddim250")[::-1])``.
    """
    if isinstance(sections, str) and sections.startswith("ddim"):
        several = _integers(sections[len("ddim") :])
        if len(several) != 1:
            raise IdmFastError(f"respace: sections must be one count behind 'ddim', got {sections!r}")
        wanted = several[0]
        for stride in range(1, n + 1):
            if math.ceil(n / stride) == wanted:
                return np.arange(0, n, stride, dtype=np.float64)
        raise IdmFastError(f"respace: ddim steps must divide {n} by a whole stride, got {wanted}")
    counts = _integers(sections) if isinstance(sections, str) else [int(count) for count in sections]
    if not counts or min(counts) < 1:
        raise IdmFastError(f"respace: sections must be counts >= 1, got {counts}")
    kept: list[int] = []
    first = 0
    for i, count in enumerate(counts):
        size = n // len(counts) + (1 if i < n % len(counts) else 0)
        if count > size:
            raise IdmFastError(f"respace: section {i} must keep at most its {size} steps, got {count}")
        stride_f = (size - 1) / (count - 1) if count > 1 else 1.0
        position = 0.0
        for _ in range(count):
            kept.append(first + round(position))
            position += stride_f  # summed, not multiplied: published chains round the same sums
        first += size
    return np.array(kept, dtype=np.float64)


def _integers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise IdmFastError(f"respace: sections must look like 'ddim250' or '10,20,30', got {text!r}") from None


def _check(steps: int, spacing: str, start: float) -> None:
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise IdmFastError(f"timesteps: steps must be an integer >= 1, got {steps!r}")
    if spacing not in SPACINGS:
        raise IdmFastError(f"timesteps: spacing must be one of {', '.join(SPACINGS)}, got {spacing!r}")
    if not 0 < start <= 1:
        raise IdmFastError(f"timesteps: start must be inside (0, 1], got {start!r}")
