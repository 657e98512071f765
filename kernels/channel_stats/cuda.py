"""CUDA kernel: csrc/channel_stats/channel_stats.cu."""

from __future__ import annotations

from torch import Tensor

from idm_fast.kernels.channel_stats import ChannelStats, piece_rows
from idm_fast.kernels.extension import cuda_stream, require_cuda, view

native = require_cuda()


def channel_stats(
    x: Tensor,  # [N, C, H, W] channels_last
    out: ChannelStats,
) -> None:
    size = piece_rows(x.shape[2] * x.shape[3])
    native.channel_stats_cuda(view(x), view(out.partials), view(out.counts), size, cuda_stream(x))
