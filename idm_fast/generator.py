"""Faces from nothing but a seed: an unconditional model, its schedule and a solver, on one device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from idm_fast.config import ModelConfig
from idm_fast.diffusion import SamplerTable, Schedule, build_table, initial_noise, sample
from idm_fast.engine import Engine, EngineOptions
from idm_fast.engine.buffers import Arena
from idm_fast.engine.precision import chosen_dtype
from idm_fast.engine.weights import PackedWeights
from idm_fast.errors import IdmFastError
from idm_fast.models.unet import UNet

Progress = Callable[[int], None]


class Generator:
    """x0 from noise. ``dtype``: fp32, bf16 or fp16, as torch type or name; ``engine=False``: the plain modules.

    Raises ``IdmFastError`` for a model with a condition, which is a restorer.
    """

    def __init__(
        self, config: ModelConfig, module: UNet, device: torch.device, dtype: torch.dtype | str, engine: bool = True
    ) -> None:
        c = config.unet
        if c.cond_channels or c.num_classes:
            raise IdmFastError(
                f"{config.name}: a generator must have cond_channels = num_classes = 0, got {c.cond_channels} and "
                f"{c.num_classes}"
            )
        self.config, self.device, self.module = config, device, module.eval()
        self.dtype, quantised = chosen_dtype(dtype, device)
        if quantised:
            raise IdmFastError("dtype of a generator must be fp32, bf16 or fp16, got int8")
        self.schedule = Schedule.from_config(config.diffusion)
        self._options: EngineOptions | None = None
        if engine:
            self._options = EngineOptions(weights=PackedWeights(module, self.dtype, device), arena=Arena(device))
        else:
            module.to(device, self.dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @torch.inference_mode()
    def generate(
        self,
        seeds: Tensor,
        steps: int | None = None,
        sampler: str | None = None,
        batch_size: int = 32,
        progress: Progress | None = None,
    ) -> Tensor:
        """One image a seed (int64 [N]): float32 [N, 3, S, S] in [-1, 1] on the CPU, whatever the batch size.

        ``steps``, ``sampler``: None = the model's own. ``progress(n)``: n images are ready. Raises ``IdmFastError``
        where the network's answer is not finite.
        """
        c = self.config
        table = build_table(
            self.schedule, c.diffusion.prediction, sampler or c.sampler, c.steps if steps is None else steps, clamp=1.0
        )
        size, ready, engine = c.unet.image_size, [], None
        for part in torch.split(seeds.to(self.device), batch_size):
            start = initial_noise(part, (len(part), c.unet.in_channels, size, size), self.device)
            if self._options is None:
                out = sample(self._answer, table, start, part, network_dtype=self.dtype)
            else:
                if engine is None or len(part) != batch_size:
                    engine = self._engine(len(part), table, self._options)
                out = engine.run(start, part)
            if not torch.isfinite(out).all():
                raise IdmFastError(f"{c.name}: network output must be finite in {self.dtype}, got inf or nan; try fp32")
            ready.append(out.clamp(-1, 1).cpu().contiguous())
            if progress is not None:
                progress(sum(map(len, ready)))
        return torch.cat(ready)

    def _answer(self, x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = self.module(x, t)
        if out.shape != x.shape:  # behind the answer is a learned variance, which no solver here uses
            out = out[:, : x.shape[1]].contiguous(memory_format=torch.channels_last)
        return out

    def _engine(self, batch: int, table: SamplerTable, options: EngineOptions) -> Engine:
        size = self.config.unet.image_size
        shape = (batch, size, size)
        return Engine.compile(self.module, shape, table, dtype=self.dtype, device=self.device, options=options)
