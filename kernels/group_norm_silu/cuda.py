"""CUDA kernel: csrc/group_norm_silu/group_norm_silu.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from idm_fast.kernels.channel_stats import MAX_PIECES, ChannelStats, empty_stats
from idm_fast.kernels.channel_stats.cuda import channel_stats
from idm_fast.kernels.extension import cuda_stream, optional_view, require_cuda, view
from idm_fast.kernels.norm_coefficients.cuda import norm_coefficients

native = require_cuda()

ALONE_ROWS = 1024  # positions up to which one launch does all: a block reads some channels of all of them twice


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
    n, c, h, w = out.shape
    table = None
    if stats is not None or skip_stats is not None or h * w > ALONE_ROWS:
        stats = _stats(x) if stats is None else stats
        skip_stats = _stats(skip) if skip is not None and skip_stats is None else skip_stats
        parts = [part for part in (stats, skip_stats) if part is not None]
        if max(part.counts.shape[0] for part in parts) > MAX_PIECES:  # too many for every block to merge by itself
            table = torch.empty((n, 3, c), dtype=torch.float32, device=x.device)
            norm_coefficients(stats, num_groups, weight, bias, eps, scale, shift, skip_stats, table)
    native.group_norm_silu_cuda(
        view(x),
        view(out),
        optional_view(weight),
        optional_view(bias),
        optional_view(scale),
        optional_view(shift),
        optional_view(skip),
        None if stats is None else view(stats.partials),
        None if stats is None else view(stats.counts),
        None if skip_stats is None else view(skip_stats.partials),
        None if skip_stats is None else view(skip_stats.counts),
        optional_view(table),
        num_groups,
        eps,
        silu,
        cuda_stream(x),
    )


def _stats(x: Tensor) -> ChannelStats:
    room = empty_stats(x)
    channel_stats(x, room)
    return room
