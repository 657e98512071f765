"""The judge: quantised as the contract says, then the convolution of what the integers stand for, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from idm_fast.kernels.channel_stats import ChannelStats
from idm_fast.kernels.conv2d.contract import output_shape, stats_room
from idm_fast.kernels.conv2d.reference import conv2d as convolution
from idm_fast.kernels.conv2d.reference import whole_stats
from idm_fast.kernels.conv2d_int8.quantise import LEVELS, NAME


def conv2d_int8(
    x: Tensor,  # [N, C1, H, W]
    weight: Tensor,  # int8 [Cout, C, k, k] or [4, Cout, C, 2, 2]
    weight_scale: Tensor,
    activation: Tensor,
    bias: Tensor | None,
    stride: int,
    upsample: bool,
    skip: Tensor | None,
    coefficients: Tensor | None,
    silu: bool,
    time_shift: Tensor | None,
    residual: Tensor | None,
    with_stats: bool,
    out: Tensor | None,
    out_stats: ChannelStats | None,
) -> Tensor | tuple[Tensor, ChannelStats]:
    shape = output_shape(x, weight, stride, upsample)
    stats = stats_room(NAME, out_stats, shape, 1, x) if with_stats else None
    a = prologue(x, skip, coefficients, silu)
    step, zero = activation.to(a.dtype)[:, :, None, None, None].unbind(1)
    steps = ((a / step + zero).round().clamp(0, LEVELS) - zero).double()
    wide = weight.double() * weight_scale.double()[..., None, None, None]
    raw, stored = (None, None, None), (False, None, None)
    y = convolution(
        steps * step.double(),
        wide,
        bias,
        stride,
        upsample,
        None,
        None,
        False,
        *raw,
        time_shift,
        residual,
        *stored,
    )
    assert isinstance(y, Tensor)
    if out is None:
        out = torch.empty(y.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    out.copy_(y)
    return out if stats is None else (out, whole_stats(out, stats))


def prologue(x: Tensor, skip: Tensor | None, coefficients: Tensor | None, silu: bool) -> Tensor:
    """silu((cat(x, skip) - centre) * gain + offset) in float32, or in float64 where x is."""
    work = torch.promote_types(x.dtype, torch.float32)
    a = x.to(work) if skip is None else torch.cat([x.to(work), skip.to(work)], 1)
    if coefficients is None:
        return a
    centre, gain, offset = coefficients.to(work)[:, :, :, None, None].unbind(1)
    a = (a - centre) * gain + offset
    return a * torch.sigmoid(a) if silu else a
