"""The same numbers by torch's float convolution of the quantised values: nothing is gained but the result."""

from __future__ import annotations

from torch import Tensor

from idm_fast.kernels.channel_stats import ChannelStats
from idm_fast.kernels.conv2d.contract import output_shape, stats_room
from idm_fast.kernels.conv2d.reference import whole_stats
from idm_fast.kernels.conv2d.torch_backend import conv2d
from idm_fast.kernels.conv2d_int8.quantise import LEVELS, NAME
from idm_fast.kernels.conv2d_int8.reference import prologue


def conv2d_int8(
    x: Tensor,  # [N, C1, H, W] channels_last
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
    steps = ((a / step + zero).round_().clamp_(0, LEVELS) - zero) * step
    wide = weight.to(a.dtype) * weight_scale.to(a.dtype)[..., None, None, None]
    raw, stored = (None, None, None), (False, None, None)
    y = conv2d(steps, wide, bias, stride, upsample, None, None, False, *raw, time_shift, residual, *stored)
    assert isinstance(y, Tensor)
    out = y.to(x.dtype) if out is None else out.copy_(y)
    return out if stats is None else (out, whole_stats(out, stats))
