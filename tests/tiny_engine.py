"""A network that an engine compiles in no time, with a walk and its inputs: what several test modules share."""

from __future__ import annotations

import torch
from torch import Tensor

from idm_fast.config import UNetConfig, preset
from idm_fast.diffusion import SamplerTable, Schedule, build_table, initial_noise
from idm_fast.models.unet import UNet

TINY = UNetConfig(
    image_size=16, model_channels=16, channel_mult=(1, 2), num_res_blocks=(1, 1), cond_channels=3, norm_groups=4,
    num_head_channels=16, unshuffle=2, residual=True, embed_channels=32,
)  # fmt: skip


def tiny_network(config: UNetConfig = TINY, seed: int = 0) -> UNet:
    """Every weight counts (fresh networks have zeros where blocks and network end)."""
    torch.manual_seed(seed)
    unet = UNet(config).eval()
    with torch.no_grad():
        for parameter in unet.parameters():
            if parameter.ndim > 1:
                torch.nn.init.xavier_normal_(parameter)
            else:
                parameter.uniform_(0.5, 1.5)
    return unet


def tiny_table(steps: int = 3, solver: str = "dpmpp_2m", clamp: float | None = 1.0) -> SamplerTable:
    diffusion = preset("idm-128").diffusion
    return build_table(Schedule.from_config(diffusion), diffusion.prediction, solver, steps, clamp=clamp)


def tiny_inputs(batch: int = 1, seed: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """(noise, seeds, condition)."""
    seeds = torch.arange(seed, seed + batch)
    cond = torch.rand(batch, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return initial_noise(seeds, (batch, 3, 16, 16), "cpu"), seeds, cond
