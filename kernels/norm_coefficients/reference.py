"""The judge: coefficients from merged statistics as the formula says, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from idm_fast.kernels.channel_stats import ChannelStats, combine


def norm_coefficients(
    stats: ChannelStats,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    skip_stats: ChannelStats | None,
    out: Tensor,  # [N, 3, C]
) -> None:
    merged = [combine(part) for part in (stats, skip_stats) if part is not None]
    mean, m2 = torch.cat([m for m, _ in merged], 1), torch.cat([s for _, s in merged], 1)
    n, c = mean.shape
    count = stats.counts.double().sum()
    mean, m2 = mean.reshape(n, num_groups, -1), m2.reshape(n, num_groups, -1)
    centre = mean.mean(2, keepdim=True)
    squares = (m2 + count * (mean - centre).square()).sum(2, keepdim=True)
    gain = (squares / (count * (c // num_groups)) + eps).rsqrt().expand_as(mean).reshape(n, c)
    centre = centre.expand_as(mean).reshape(n, c)
    offset = torch.zeros_like(gain) if bias is None else bias.double().expand(n, c)
    if weight is not None:
        gain = gain * weight.double()
    if scale is not None and shift is not None:
        gain = gain * (1 + scale.double())
        offset = offset * (1 + scale.double()) + shift.double()
    rounded = centre.to(out.dtype)
    out[:, 0] = rounded
    out[:, 1] = gain
    out[:, 2] = offset + (rounded.double() - centre) * gain
