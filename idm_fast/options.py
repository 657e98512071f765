"""What a caller may ask of ``Restorer.restore``, checked before any work."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch

from idm_fast.errors import IdmFastError
from idm_fast.faces.pipeline import WHICH

OUTPUT_TYPES = ("pil", "np", "picture")
_SEEDS = 2**62


@dataclass(frozen=True)
class RestoreOptions:
    """Everything but the sampling. ``face``: "all", "largest" or "center". ``blend`` in [0, 1]: 0 keeps the input,
    1 takes the restored face whole. ``upscale`` in [1, 8] enlarges the whole picture. ``aligned``: the input is itself
    one aligned crop. ``batch_size``: faces a network call. ``seed`` in [0, 2^62).

    Raises ``IdmFastError`` naming the option, what it must be and what it was.
    """

    face: str = "all"
    blend: float = 1.0
    upscale: float = 1.0
    aligned: bool = False
    batch_size: int = 8
    seed: int = 0
    output_type: str = "pil"

    def __post_init__(self) -> None:
        for name, kind, words in (
            ("blend", Real, "a number"),
            ("upscale", Real, "a number"),
            ("batch_size", Integral, "a whole number"),
            ("seed", Integral, "a whole number"),
        ):
            value: Any = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, kind):
                raise IdmFastError(f"{name} must be {words}, got {value!r}")
        if self.face not in WHICH:
            raise IdmFastError(f"face must be one of {', '.join(WHICH)}, got {self.face!r}")
        if not 0 <= self.blend <= 1:
            raise IdmFastError(f"blend must lie in [0, 1], got {self.blend}")
        if not 1 <= self.upscale <= 8:
            raise IdmFastError(f"upscale must lie in [1, 8], got {self.upscale}")
        if self.batch_size < 1:
            raise IdmFastError(f"batch_size must be >= 1, got {self.batch_size}")
        if not 0 <= self.seed < _SEEDS:
            raise IdmFastError(f"seed must lie in [0, 2^62), got {self.seed}")
        if self.output_type not in OUTPUT_TYPES:
            raise IdmFastError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, got {self.output_type!r}")


def seed_from(generator: Any) -> int:
    """diffusers' ``generator`` as a seed: a number is the seed itself, a generator gives one number of its stream."""
    if isinstance(generator, torch.Generator):
        drawn = torch.randint(_SEEDS, (), generator=generator, device=generator.device, dtype=torch.int64)
        return int(drawn.item())
    if isinstance(generator, Integral) and generator is not True and generator is not False:
        return int(generator)
    raise IdmFastError(f"generator must be a torch.Generator or a whole number, got {type(generator).__name__}")
