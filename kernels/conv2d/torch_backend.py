"""oneDNN's or cuDNN's convolution with separate passes around it: the competitor of every layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from idm_fast.kernels.channel_stats import ChannelStats
from idm_fast.kernels.conv2d.contract import output_shape, stats_room


def conv2d(
    x: Tensor,  # [N, C1, H, W] channels_last
    weight: Tensor,  # [Cout, C, k, k] channels_last, or [4, Cout, C, 2, 2]
    bias: Tensor | None,
    stride: int,
    upsample: bool,
    skip: Tensor | None,
    coefficients: Tensor | None,
    silu: bool,
    shortcut: Tensor | None,
    shortcut_skip: Tensor | None,
    shortcut_weight: Tensor | None,
    time_shift: Tensor | None,
    residual: Tensor | None,
    with_stats: bool,
    out: Tensor | None,
    out_stats: ChannelStats | None,
) -> Tensor | tuple[Tensor, ChannelStats]:
    shape = output_shape(x, weight, stride, upsample)
    stats = stats_room("conv2d", out_stats, shape, 1, x) if with_stats else None
    h = x if skip is None else torch.cat([x, skip], 1)
    if coefficients is not None:
        h = _prologue(h, coefficients, silu)
    added = None if bias is None else bias.to(x.dtype)
    if time_shift is not None and x.shape[0] == 1:  # one sample: the shift is a part of the bias
        work = torch.promote_types(x.dtype, torch.float32)
        added = (time_shift[0] if bias is None else bias.to(work) + time_shift[0]).to(x.dtype)
        time_shift = None
    if upsample:
        y = _phases(h, weight, added, out)
    else:
        y = F.conv2d(h, weight, added, stride, weight.shape[-1] // 2)
    if shortcut is not None and shortcut_weight is not None:
        raw = shortcut if shortcut_skip is None else torch.cat([shortcut, shortcut_skip], 1)
        y += F.conv2d(raw, shortcut_weight[:, :, None, None])
    if time_shift is not None:
        y += time_shift.to(x.dtype)[:, :, None, None]
    if residual is not None:
        y += residual
    if out is None:
        out = y.contiguous(memory_format=torch.channels_last)
    elif y is not out:
        out.copy_(y)
    return out if stats is None else (out, _stats(out, stats))


def _prologue(x: Tensor, coefficients: Tensor, silu: bool) -> Tensor:
    centre, gain, offset = coefficients[:, :, :, None, None].unbind(1)
    if x.dtype in (torch.float32, torch.float64):
        y = torch.addcmul(offset, x - centre, gain)
    else:  # the sum in float32 loses nothing that 16 bits would show, and one pass is saved
        y = torch.addcmul(torch.addcmul(offset, centre, gain, value=-1), x, gain)
    return (F.silu(y, inplace=True) if silu else y).to(x.dtype)


def _phases(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
    """All four phases as one 2x2 convolution with 4 Cout channels, of which each takes its window, then interleaved.

    A phase of parity a starts its windows at i + a - 1: one row of padding on both sides serves both parities.
    """
    n, _, h, w = x.shape
    cout = weight.shape[1]
    stacked = weight.permute(0, 1, 3, 4, 2).reshape(4 * cout, 2, 2, -1).permute(0, 3, 1, 2)
    y = F.conv2d(x, stacked, None if bias is None else bias.repeat(4), 1, 1)
    if out is None:
        shape = (n, cout, 2 * h, 2 * w)
        out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    for phase in range(4):
        a, b = divmod(phase, 2)
        out[:, :, a::2, b::2] = y[:, phase * cout : (phase + 1) * cout, a : a + h, b : b + w]
    return out


def _stats(out: Tensor, stats: ChannelStats) -> ChannelStats:
    wide = out.to(stats.partials.dtype)
    variance, mean = torch.var_mean(wide, (2, 3), correction=0)
    positions = out.shape[2] * out.shape[3]
    stats.partials[:, 0, 0] = mean
    torch.mul(variance, positions, out=stats.partials[:, 0, 1])
    stats.counts.fill_(float(positions))
    return stats
