"""The same in torch's operators and float32: what runs where no kernel of ours can."""

from __future__ import annotations

import torch
from torch import Tensor

from idm_fast.kernels.channel_stats import ChannelStats


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
    merged = [_merge(part) for part in (stats, skip_stats) if part is not None]
    mean, m2 = torch.cat([m for m, _ in merged], 1), torch.cat([s for _, s in merged], 1)
    n, c = mean.shape
    count, width = stats.counts.sum(), c // num_groups
    mean, m2 = mean.view(n, num_groups, width), m2.view(n, num_groups, width)
    # Differences from the first channel's mean are small where the mean is far from zero; their sum loses nothing.
    pivot = mean[:, :, :1]
    rest = (mean - pivot).mean(2, keepdim=True)
    variance = (m2 / count + (mean - pivot - rest).square()).mean(2, keepdim=True)
    centre = pivot + rest
    left_out = (centre - pivot) - rest  # what the rounded mean adds
    gain = torch.rsqrt(variance + eps).expand(n, num_groups, width).reshape(n, c)
    if weight is not None:
        gain = gain * weight.float()
    if scale is not None and shift is not None:
        factor = 1 + scale.float()
        gain = gain * factor
        offset = shift.float() if bias is None else bias.float() * factor + shift.float()
    else:
        offset = torch.zeros_like(gain) if bias is None else bias.float()
    out[:, 0] = centre.expand(n, num_groups, width).reshape(n, c)
    out[:, 1] = gain
    out[:, 2] = offset + left_out.expand(n, num_groups, width).reshape(n, c) * gain


def _merge(stats: ChannelStats) -> tuple[Tensor, Tensor]:
    """(mean, M2) [N, C] of all pieces."""
    partials, counts = stats
    weights = counts.view(1, -1, 1)
    pivot = partials[:, :1, 0]
    delta = partials[:, :, 0] - pivot
    rest = (delta * weights).sum(1, keepdim=True) / counts.sum()
    m2 = partials[:, :, 1].sum(1) + ((delta - rest).square() * weights).sum(1)
    return (pivot + rest)[:, 0], m2
