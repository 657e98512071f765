"""CPU kernel: csrc/group_norm_silu."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from idm_fast.kernels.channel_stats import ChannelStats
from idm_fast.kernels.extension import (
    KEPT_BYTES,
    Prepared,
    binder,
    fresh,
    layout,
    optional_view,
    require_native,
    view,
)
from idm_fast.kernels.group_norm_silu import empty_beside

native = require_native()


def prepare(
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
) -> Prepared:
    arguments = (
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
    return Prepared(arguments)


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
    skip: Tensor | None,
    stats: ChannelStats | None,
    skip_stats: ChannelStats | None,
    out: Tensor,
) -> None:
    call = prepare(x, num_groups, weight, bias, eps, scale, shift, silu, skip, stats, skip_stats, out)
    native.group_norm_silu(*call.arguments)


def _prepare(
    run: Callable[..., None],
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    skip: Tensor | None,
    out: Tensor,
) -> Callable[..., Tensor]:
    """The same for tensors that look like these: only their addresses have to be told."""
    of_x, of_out = layout(x), layout(out)
    known = (None if t is None else layout(t) for t in (weight, bias, scale, shift, skip))
    of_weight, of_bias, of_scale, of_shift, of_skip = known
    call, threads, large = native.group_norm_silu, torch.get_num_threads, out.nbytes >= KEPT_BYTES

    def again(
        x: Tensor,
        num_groups: int,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        scale: Tensor | None,
        shift: Tensor | None,
        silu: bool,
        skip: Tensor | None,
    ) -> Tensor:
        out = torch.empty_like(x) if skip is None else empty_beside(x, skip)
        if large:
            fresh(out)
        call(
            (x.data_ptr(), of_x),
            (out.data_ptr(), of_out),
            None if weight is None else (weight.data_ptr(), of_weight),
            None if bias is None else (bias.data_ptr(), of_bias),
            None if scale is None else (scale.data_ptr(), of_scale),
            None if shift is None else (shift.data_ptr(), of_shift),
            None if skip is None else (skip.data_ptr(), of_skip),
            None,
            None,
            None,
            None,
            num_groups,
            eps,
            silu,
            threads(),
        )
        return out

    return again


group_norm_silu.prepare = _prepare  # type: ignore[attr-defined]  # what the public function asks a backend for
group_norm_silu.bind = binder(native.group_norm_silu, prepare)  # type: ignore[attr-defined]  # and dispatch.bound
