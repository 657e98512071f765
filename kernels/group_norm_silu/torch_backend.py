"""torch's own group norm and SiLU: the competitor, and what runs where no kernel of ours can."""

from __future__ import annotations

import torch
from torch import Tensor

from idm_fast.kernels.channel_stats import ChannelStats, empty_stats
from idm_fast.kernels.channel_stats.torch_backend import channel_stats
from idm_fast.kernels.norm_coefficients.torch_backend import norm_coefficients


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
    whole = x if skip is None else torch.cat([x, skip], 1)
    if stats is None and skip_stats is None:
        y = torch.group_norm(whole, num_groups, _as(weight, x), _as(bias, x), eps)
        if scale is not None and shift is not None:
            n, c = scale.shape
            y = torch.addcmul(shift.to(x.dtype).view(n, c, 1, 1), y, 1 + scale.to(x.dtype).view(n, c, 1, 1))
    else:
        n, c = whole.shape[:2]
        stats = _stats(x) if stats is None else stats
        skip_stats = _stats(skip) if skip is not None and skip_stats is None else skip_stats
        table = torch.empty((n, 3, c), dtype=stats.partials.dtype, device=x.device)
        norm_coefficients(stats, num_groups, weight, bias, eps, scale, shift, skip_stats, table)
        centre, gain, offset = table[:, :, :, None, None].unbind(1)
        y = torch.addcmul(offset, whole.to(table.dtype) - centre, gain).to(x.dtype)
    if silu:
        torch.ops.aten.silu.out(y, out=out)
    else:
        out.copy_(y)


def _stats(x: Tensor) -> ChannelStats:
    room = empty_stats(x)
    channel_stats(x, room)
    return room


def _as(parameter: Tensor | None, x: Tensor) -> Tensor | None:
    return None if parameter is None else parameter.to(x.dtype)
