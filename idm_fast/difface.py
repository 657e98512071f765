"""DifFace (2212.06512): a noised estimate of the clean face, in the middle of an unconditional model's chain.

The model has never seen a degraded picture; what it knows is how clean faces look. The estimate carries who is shown,
the noise hides what is wrong with it, and the chain from there on draws what is missing.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from idm_fast.config import ModelConfig
from idm_fast.crops import CropRestorer, SampleSettings
from idm_fast.diffusion import SamplerTable, build_table, noised_start, respace
from idm_fast.diffusion.spacing import Array, discrete
from idm_fast.errors import IdmFastError
from idm_fast.estimators import Estimator
from idm_fast.models.unet import UNet
from idm_fast.walk import Walk

RESPACING = "ddim250"  # of 1000 training steps every fourth: 0, 4, ..., 996
START_INDEX = 100  # of them; its public code noises to this one and walks 99 .. 0
ETA = 0.5


class DifFace(CropRestorer):
    """x0_hat of degraded crops by an unconditional network: DifFace's chain, which its public code walks with DDIM.

    ``estimator``: what makes the estimate of the clean crop. ``start_index``: the index in the respaced chain to whose
    noise the estimate is taken; lower stays nearer to it. The other arguments are ``CropRestorer``'s.

    Defaults are those of the public code: 250 of 1000 steps, start at index 100, DDIM with eta 0.5. With ``steps`` (at
    most ``start_index``) only so many of the indices below it are walked: faster, and the authors' chain no more.
    Raises ``IdmFastError`` for a network that is shown a picture, and for a start outside the chain.
    """

    def __init__(
        self,
        config: ModelConfig,
        module: UNet,
        device: torch.device,
        dtype: torch.dtype | str,
        backend: str | None = None,
        engine: bool = True,
        cache_every: int = 1,
        *,
        estimator: Estimator,
        start_index: int = START_INDEX,
    ) -> None:
        if config.unet.cond_channels:
            raise IdmFastError(f"difface: {config.name} must be unconditional, got a network that is shown a picture")
        config = replace(config, sampler="ddim", strength=1.0, respacing=RESPACING)
        super().__init__(config, module, device, dtype, backend, engine, cache_every)
        self.estimator, self.start_index = estimator, start_index
        self.table(SampleSettings().resolved(config))  # a start outside the chain is said now

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (super().__reduce__()[1], self.estimator, self.start_index)

    def _chain(self, respacing: str) -> Array:
        """Times that the respaced chain keeps, rising; continuous time is cut into 1000 equal steps for it."""
        if self.schedule.size is not None:
            return super()._chain(respacing)
        return (respace(1000, respacing) + 1) * (self.schedule.t_max / 1000)

    def _table(self, settings: SampleSettings) -> SamplerTable:
        if settings.strength != 1:
            raise IdmFastError(f"strength must be left out with difface (start index says it), got {settings.strength}")
        chain = self._chain(settings.respacing or RESPACING)
        if not 1 <= self.start_index < len(chain):
            last = len(chain) - 1
            raise IdmFastError(f"difface: start index must lie in 1..{last} of the chain, got {self.start_index}")
        below = range(self.start_index - 1, -1, -1)
        if settings.steps is not None:
            below = discrete(self.start_index, settings.steps, "trailing", 1.0).astype(int)  # type: ignore[assignment]
        solver = settings.sampler or "ddim"
        eta = ETA if settings.eta is None and solver == "ddim" else settings.eta
        return build_table(
            self.schedule, self.config.diffusion.prediction, solver, timesteps=chain[list(below)], eta=eta, clamp=1.0,
            noise_timestep=float(chain[self.start_index]), variance=self.config.diffusion.variance,
        )  # fmt: skip

    def _begun(self, walk: Walk) -> Walk:
        estimate = self.estimator(walk.x, walk.seeds).clamp(-1, 1).contiguous(memory_format=torch.channels_last)
        return replace(walk, x=noised_start(estimate, walk.table, walk.seeds), cond=None)


def _again(given: tuple[Any, ...], estimator: Estimator, start_index: int) -> DifFace:
    return DifFace(*given, estimator=estimator, start_index=start_index)
