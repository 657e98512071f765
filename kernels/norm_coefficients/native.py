"""CPU kernel: csrc/norm_coefficients."""

from __future__ import annotations

import torch
from torch import Tensor

from idm_fast.kernels.channel_stats import ChannelStats
from idm_fast.kernels.extension import Prepared, binder, optional_view, require_native, view

native = require_native()


def prepare(
    stats: ChannelStats,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    skip_stats: ChannelStats | None,
    out: Tensor,  # [N, 3, C]
) -> Prepared:
    arguments = (
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
        torch.get_num_threads(),
    )
    return Prepared(arguments)


def norm_coefficients(
    stats: ChannelStats,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    skip_stats: ChannelStats | None,
    out: Tensor,
) -> None:
    call = prepare(stats, num_groups, weight, bias, eps, scale, shift, skip_stats, out)
    native.norm_coefficients(*call.arguments)


norm_coefficients.bind = binder(native.norm_coefficients, prepare)  # type: ignore[attr-defined]  # what dispatch.bound asks for
