"""CPU kernel: csrc/group_norm_silu."""

from __future__ import annotations

import torch
from torch import Tensor

from idm_fast.kernels.channel_stats import ChannelStats
from idm_fast.kernels.extension import optional_view, require_native, view

native = require_native()


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
    native.group_norm_silu(
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
        num_groups,
        eps,
        silu,
        torch.get_num_threads(),
    )
