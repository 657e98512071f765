"""The judge: the convolution as a sum over its taps, in float64 where the input is float64, else in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from idm_fast.kernels.channel_stats import ChannelStats
from idm_fast.kernels.conv2d.contract import output_shape, stats_room


def conv2d(
    x: Tensor,  # [N, C1, H, W]
    weight: Tensor,  # [Cout, C, k, k] or [4, Cout, C, 2, 2]
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
    work = torch.promote_types(x.dtype, torch.float32)
    shape = output_shape(x, weight, stride, upsample)
    stats = stats_room("conv2d", out_stats, shape, 1, x) if with_stats else None
    h = _cat(x, skip, work)
    if coefficients is not None:
        centre, gain, offset = coefficients.to(work)[:, :, :, None, None].unbind(1)
        h = (h - centre) * gain + offset
        if silu:
            h = h * torch.sigmoid(h)
    if upsample:
        n, _, rows, columns = h.shape
        y = h.new_empty((n, weight.shape[1], 2 * rows, 2 * columns))
        for phase in range(4):
            a, b = divmod(phase, 2)
            y[:, :, a::2, b::2] = _taps(h, weight[phase].to(work), 1, (1 - a, 1 - b))
    else:
        pad = weight.shape[-1] // 2
        y = _taps(h, weight.to(work), stride, (pad, pad))
    if bias is not None:
        y = y + bias.to(work)[None, :, None, None]
    if shortcut is not None and shortcut_weight is not None:
        y = y + torch.einsum("nchw,oc->nohw", _cat(shortcut, shortcut_skip, work), shortcut_weight.to(work))
    if time_shift is not None:
        y = y + time_shift.to(work)[:, :, None, None]
    if residual is not None:
        y = y + residual.to(work)
    if out is None:
        out = torch.empty(y.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    out.copy_(y)
    return out if stats is None else (out, whole_stats(out, stats))


def whole_stats(out: Tensor, stats: ChannelStats) -> ChannelStats:
    """Statistics of a stored result in one piece, into ``stats``."""
    stored = out.to(stats.partials.dtype)
    mean = stored.mean((2, 3))
    stats.partials[:, 0, 0] = mean
    stats.partials[:, 0, 1] = (stored - mean[:, :, None, None]).square().sum((2, 3))
    stats.counts.fill_(float(out.shape[2] * out.shape[3]))
    return stats


def _cat(first: Tensor, second: Tensor | None, dtype: torch.dtype) -> Tensor:
    return first.to(dtype) if second is None else torch.cat([first.to(dtype), second.to(dtype)], 1)


def _taps(h: Tensor, weight: Tensor, stride: int, before: tuple[int, int]) -> Tensor:
    """Sum over the taps of ``weight`` [Cout, C, k, k]; ``before``: rows and columns of zeros above and to the left."""
    n, c, rows, columns = h.shape
    k = weight.shape[-1]
    padded = h.new_zeros((n, c, rows + k, columns + k))
    padded[:, :, before[0] : before[0] + rows, before[1] : before[1] + columns] = h
    y = h.new_zeros((n, weight.shape[0], (rows - 1) // stride + 1, (columns - 1) // stride + 1))
    for i in range(k):
        for j in range(k):
            seen = padded[:, :, i : i + rows : stride, j : j + columns : stride]
            y += torch.einsum("nchw,oc->nohw", seen, weight[:, :, i, j])
    return y
