"""What may be asked of a walk, in any model's words."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real

from idm_fast.config import ModelConfig
from idm_fast.diffusion import CORRECTOR_SNR
from idm_fast.errors import IdmFastError


@dataclass(frozen=True)
class GuidanceSettings:
    """How a CLR-Face walk is pulled towards the identity that was recovered; ``None`` means the model's own default.

    ``scale`` >= 0: how far a step goes at most, in deviations of the latent; 0: no guidance. ``repeats`` k >= 1: steps
    at a guided evaluation. ``interval`` (start, stop) with 0 <= start < stop <= 1: the part of the way that is guided.
    ``every`` k >= 1: a gradient at every k-th of its evaluations, kept for those between. ``resolution``: side in
    pixels at which faces are decoded for recognition; less is faster, and lossy.
    ``masked``: False moves the whole latent, for comparison.
    Raises ``IdmFastError`` naming the value, what it must be and what it was.
    """

    scale: float | None = None
    interval: tuple[float, float] | None = None
    every: int | None = None
    resolution: int | None = None
    repeats: int | None = None
    masked: bool = True

    def __post_init__(self) -> None:
        if self.scale is not None and not (_is(self.scale, Real) and 0 <= self.scale < math.inf):
            raise IdmFastError(f"guidance_scale must be a number >= 0, got {self.scale!r}")
        if self.interval is not None:
            pair = tuple(self.interval) if isinstance(self.interval, tuple | list) else ()
            if len(pair) != 2 or not all(_is(end, Real) for end in pair) or not 0 <= pair[0] < pair[1] <= 1:
                raise IdmFastError(f"guidance_interval must be 0 <= start < stop <= 1, got {self.interval!r}")
            object.__setattr__(self, "interval", (float(pair[0]), float(pair[1])))  # a list cannot be hashed
        for name in ("every", "resolution", "repeats"):
            value = getattr(self, name)
            if value is not None and not (_is(value, Integral) and value >= 1):
                raise IdmFastError(f"guidance_{name} must be a whole number >= 1, got {value!r}")
            object.__setattr__(self, name, None if value is None else int(value))  # numpy's too

    @property
    def given(self) -> list[str]:
        """Names of what is not left to the model."""
        return [f"guidance_{item.name}" for item in fields(self) if getattr(self, item.name) != item.default]


def guidance_settings(
    wanted: bool,
    scale: float | None = None,
    interval: tuple[float, float] | None = None,
    every: int | None = None,
    resolution: int | None = None,
    repeats: int | None = None,
) -> GuidanceSettings:
    """``wanted`` False: no guidance, about which nothing else must be said then."""
    made = GuidanceSettings(scale, interval, every, resolution, repeats)
    if wanted:
        return made
    if made.given:
        raise IdmFastError(f"{', '.join(made.given)} must be left out where identity_guidance is off")
    return GuidanceSettings(0.0)


def _is(value: object, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


@dataclass(frozen=True)
class SampleSettings:
    """How to walk from noise to picture; ``None`` means the model's own default.

    ``steps`` >= 1; ``sampler``: a solver's name; ``eta``: its randomness in [0, 1]; ``strength`` in (0, 1]: 1 starts
    from pure noise, less from the noised input at that part of the way. ``respacing``, in the place of ``steps``: the
    training steps that are walked, in guided-diffusion's notation ("ddim250", "250", "10,15,20"). ``corrector_steps``
    and ``corrector_snr``: the Langevin steps between those of the solver, as ``build_table`` takes them. ``guidance``:
    of models that have one.
    """

    steps: int | None = None
    sampler: str | None = None
    eta: float | None = None
    strength: float | None = None
    respacing: str | None = None
    corrector_steps: int = 0
    corrector_snr: float = CORRECTOR_SNR
    guidance: GuidanceSettings = GuidanceSettings()

    def resolved(self, config: ModelConfig) -> SampleSettings:
        """The same with the model's defaults filled in; either ``steps`` or ``respacing`` is None then."""
        if self.steps is not None and self.respacing is not None:
            raise IdmFastError(f"respacing must not be given with steps, got {self.respacing!r} and {self.steps}")
        respacing = self.respacing if self.respacing is not None or self.steps is not None else config.respacing or None
        steps = config.steps if self.steps is None else self.steps
        return replace(
            self,
            steps=steps if respacing is None else None,
            sampler=config.sampler if self.sampler is None else self.sampler,
            strength=config.strength if self.strength is None else self.strength,
            respacing=respacing,
        )
