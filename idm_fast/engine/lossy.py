"""What buys speed with exactness, each off by default: 8-bit convolutions behind a norm, inner levels that are reused.

The steps of the 8-bit numbers follow from the norm's gamma and beta, and from no data.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from idm_fast.config import UNetConfig
from idm_fast.engine.nodes import EightBit
from idm_fast.errors import IdmFastError
from idm_fast.kernels.conv2d_fp8.quantise import activation_scale as e4m3_scale
from idm_fast.kernels.conv2d_fp8.quantise import quantise_weight as e4m3_weight
from idm_fast.kernels.conv2d_int8.quantise import activation_scale as int8_scale
from idm_fast.kernels.conv2d_int8.quantise import quantise_weight as int8_weight
from idm_fast.kernels.dispatch import forced_backends

FP8_CAPABILITY = (9, 0)  # the kernels are compiled ahead of time, and held to a budget of registers, for sm_90
REUSE_COST = "50 to 55 dB PSNR to the exact walk at every 2nd step, 45 dB at every 4th, measured on 8 validation faces"


@dataclass(frozen=True)
class Tier:
    """``quantise_weight``: (8-bit weight, its scales). ``activation_scale``: from (gamma, beta[, scale, shift]) the
    ``columns`` numbers of the time row that a convolution reads. ``cost``: what it was measured to lose."""

    columns: int
    quantise_weight: Callable[[Tensor], tuple[Tensor, Tensor]]
    activation_scale: Callable[..., Tensor]
    cost: str


TIERS: dict[EightBit, Tier] = {
    "int8": Tier(
        2, int8_weight, int8_scale,
        "47 to 56 dB PSNR to fp32 in 1 and 4 steps, measured on 8 validation faces with idm-face-128 and -256",
    ),
    "fp8": Tier(
        1, e4m3_weight, e4m3_scale,
        "55 to 65 dB PSNR to fp32 in 1 and 4 steps, 8 validation faces with idm-face-128 and -256, imitated on a CPU",
    ),
}  # fmt: skip


def why_not(tier: EightBit, device: torch.device, backend: str | None = None) -> str | None:
    """What ``tier`` must have and ``device`` lacks, or None. ``backend``: one that is forced."""
    if tier == "int8":
        return None if device.type == "cpu" else f"int8 needs a CPU, got {device}"
    if device.type == "cpu":
        if backend is not None or forced_backends():
            return None
        return "fp8 needs a CUDA device of sm_90 or later (on a CPU a forced back end, torch, imitates it), got cpu"
    capability = torch.cuda.get_device_capability(device)
    if capability >= FP8_CAPABILITY:
        return None
    return f"fp8 needs a CUDA device of sm_90 or later, got {device} of sm_{capability[0]}{capability[1]}"


def check_reuse(config: UNetConfig, cache_every: int) -> None:
    """Raises ``IdmFastError`` where ``EngineOptions.cache_every`` is none, or the network has nothing to reuse."""
    if isinstance(cache_every, bool) or not isinstance(cache_every, int) or cache_every < 1:
        raise IdmFastError(f"cache_every must be a whole number >= 1, got {cache_every!r}")
    if cache_every > 1 and len(config.channel_mult) == 1:
        raise IdmFastError(f"cache_every must be 1 for a network of one level, got {cache_every}")
