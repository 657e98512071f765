"""CUDA kernel: csrc/norm_coefficients/norm_coefficients.cu."""

from __future__ import annotations

from torch import Tensor

from idm_fast.kernels.channel_stats import ChannelStats
from idm_fast.kernels.extension import cuda_stream, optional_view, require_cuda, view

native = require_cuda()


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
    native.norm_coefficients_cuda(
        view(stats.partials),
        view(stats.counts),
        None if skip_stats is None else view(skip_stats.partials),
        None if skip_stats is None else view(skip_stats.counts),
        optional_view(weight),
        optional_view(bias),
        optional_view(scale),
        optional_view(shift),
        num_groups,
        eps,
        view(out),
        cuda_stream(out),
    )
