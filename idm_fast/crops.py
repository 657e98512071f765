"""``CropRestorer``: aligned crops restored by a network that works on pictures. Knows nothing of photographs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from idm_fast.config import ModelConfig
from idm_fast.diffusion import SamplerTable, initial_noise, noised_start, sample
from idm_fast.engine import Engine, EngineOptions
from idm_fast.engine.weights import PackedWeights
from idm_fast.face_model import MOST_ENGINES, FaceModel, Progress
from idm_fast.models.unet import UNet
from idm_fast.sampling import SampleSettings
from idm_fast.walk import Walk

__all__ = ["MOST_ENGINES", "CropRestorer", "Progress", "SampleSettings"]

# The operations of a restoration: of the modules, and of the engine.
USED = ("group_norm_silu", "attention", "sampler_update")
USED_BY_ENGINE = ("conv2d", "norm_coefficients", "attention", "sampler_update")


class CropRestorer(FaceModel):
    """x0_hat of degraded crops by one network. Arguments as for ``FaceModel``."""

    module: UNet
    config: ModelConfig

    @property
    def walked(self) -> ModelConfig:
        return self.config

    @property
    def size(self) -> int:
        return self.config.unet.image_size

    def _place(self) -> None:
        if self._engines is not None:  # it packs the weights as they come, and rounds them once
            self._packed = (PackedWeights(self.module, self.dtype, self.device),)
        else:
            self.module.to(self.device, self.dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def _used(self) -> Iterator[tuple[str, torch.dtype]]:
        used: tuple[str, ...] = USED if self._engines is None else USED_BY_ENGINE
        if self._engines is not None and self.config.unet.resample == "resblock":
            used += ("group_norm_silu", "resample2x")
        if self.quantised:
            used += (f"conv2d_{self.quantised}",)
        for name in used:
            # The update reads the network's answer, which a residual network adds to its float32 condition.
            yield name, torch.float32 if name == "sampler_update" and self.config.unet.residual else self.dtype

    def _begun(self, walk: Walk) -> Walk:
        y, seeds = walk.x, walk.seeds
        start = initial_noise(seeds, y.shape, self.device) if walk.whole else noised_start(y, walk.table, seeds)
        return replace(walk, x=start, cond=self._condition(y))

    def _condition(self, y: Tensor) -> Tensor:
        """What the network is shown: of a super-resolution network, what is left of the crop at the size it knows."""
        enlarge = self.config.unet.cond_resize
        low_res = self.config.low_res or (self.size // 4 if enlarge == "bilinear" else 0)
        if not 0 < low_res < self.size:
            return y
        # As the families were trained: guided-diffusion on torch's area and bilinear, SR3 on Pillow's bicubic.
        bicubic: dict[str, Any] = {"mode": "bicubic", "antialias": True}
        down, up = ({"mode": "area"}, {"mode": "bilinear"}) if enlarge == "bilinear" else (bicubic, bicubic)
        small = interpolate(y, (low_res, low_res), **down).clamp_(-1, 1)
        large = interpolate(small, (self.size, self.size), **up)
        return large.clamp_(-1, 1).contiguous(memory_format=torch.channels_last)

    def _walked_plainly(self, walk: Walk) -> Tensor:
        return sample(
            lambda x, t: self.module(x, t, walk.cond), walk.table, walk.x, walk.seeds,
            callback=walk.report, network_dtype=self.dtype,
        )  # fmt: skip

    def _compiled(self, batch: int, table: SamplerTable, options: EngineOptions) -> Engine:
        return Engine.compile(
            self.module, (batch, self.size, self.size), table,
            dtype=self.quantised or self.dtype, device=self.device, options=options,
        )  # fmt: skip
