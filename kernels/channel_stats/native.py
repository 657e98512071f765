"""CPU kernel: csrc/channel_stats."""

from __future__ import annotations

import torch
from torch import Tensor

from idm_fast.kernels.channel_stats import ChannelStats, piece_rows
from idm_fast.kernels.extension import Prepared, binder, require_native, view

native = require_native()


def prepare(
    x: Tensor,  # [N, C, H, W] channels_last
    out: ChannelStats,
) -> Prepared:
    size = piece_rows(x.shape[2] * x.shape[3])
    return Prepared((view(x), view(out.partials), view(out.counts), size, torch.get_num_threads()))


def channel_stats(x: Tensor, out: ChannelStats) -> None:
    native.channel_stats(*prepare(x, out).arguments)


channel_stats.bind = binder(native.channel_stats, prepare)  # type: ignore[attr-defined]  # what dispatch.bound asks for
