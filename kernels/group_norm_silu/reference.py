"""The judge: group norm + SiLU as the formula says, in float64 where the input is float64, else in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from idm_fast.kernels.channel_stats import ChannelStats, empty_stats
from idm_fast.kernels.channel_stats.reference import channel_stats
from idm_fast.kernels.norm_coefficients.reference import norm_coefficients


def group_norm_silu(
    x: Tensor,  # [N, C1, H, W] channels_last
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
    skip: Tensor | None,  # [N, C2, H, W] channels_last
    stats: ChannelStats | None,
    skip_stats: ChannelStats | None,
    out: Tensor,  # [N, C, H, W] channels_last
) -> None:
    work = torch.promote_types(x.dtype, torch.float32)
    whole = (x if skip is None else torch.cat([x, skip], 1)).to(work)
    n, c, _, _ = whole.shape
    if stats is None and skip_stats is None:
        groups = whole.reshape(n, num_groups, -1)
        centred = groups - groups.mean(dim=2, keepdim=True)
        variance = centred.square().mean(dim=2, keepdim=True)
        y = (centred / (variance + eps).sqrt()).reshape(whole.shape)
        if weight is not None:
            y = y * weight.to(work).reshape(1, c, 1, 1)
        if bias is not None:
            y = y + bias.to(work).reshape(1, c, 1, 1)
        if scale is not None and shift is not None:
            y = y * (1 + scale.to(work).reshape(n, c, 1, 1)) + shift.to(work).reshape(n, c, 1, 1)
    else:
        table = torch.empty((n, 3, c), dtype=torch.float64, device=x.device)
        stats = _stats(x) if stats is None else stats
        skip_stats = _stats(skip) if skip is not None and skip_stats is None else skip_stats
        norm_coefficients(stats, num_groups, weight, bias, eps, scale, shift, skip_stats, table)
        centre, gain, offset = table[:, :, :, None, None].unbind(1)
        y = ((whole.double() - centre) * gain + offset).to(work)
    if silu:
        y = y * torch.sigmoid(y)
    out.copy_(y)


def _stats(x: Tensor) -> ChannelStats:
    room = empty_stats(x.double())
    channel_stats(x, room)
    return room
