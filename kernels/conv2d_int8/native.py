"""CPU kernel: csrc/conv2d_int8."""

from __future__ import annotations

import torch
from torch import Tensor

from idm_fast.kernels.channel_stats import ChannelStats
from idm_fast.kernels.conv2d.contract import output_shape
from idm_fast.kernels.conv2d.native import block_counts
from idm_fast.kernels.conv2d.packing import PackedCache, extents
from idm_fast.kernels.extension import optional_view, require_native, view

native = require_native()


def pack_weight(
    weight: Tensor,  # int8 [Cout, C, k, k] channels_last or [4, Cout, C, 2, 2]
) -> Tensor:
    """Strips of output channels in words of four channels, and the sum of each output channel; see csrc/conv2d_int8."""
    packed = torch.empty(native.conv2d_int8_packed_bytes(*extents(weight)), dtype=torch.int8)
    native.conv2d_int8_pack(view(weight), *extents(weight), view(packed))
    return packed


_packed = PackedCache(pack_weight)


def conv2d_int8(
    x: Tensor,  # [N, C1, H, W] channels_last
    weight: Tensor,  # int8 [Cout, C, k, k] channels_last or [4, Cout, C, 2, 2]
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
) -> Tensor | tuple[Tensor, ChannelStats]:
    shape = output_shape(x, weight, stride, upsample)
    if out is None:
        out = torch.empty(shape, dtype=x.dtype, memory_format=torch.channels_last)
    kernel = 3 if upsample else weight.shape[-1]
    stats = None
    if with_stats:
        grid = x.shape[2:] if upsample else shape[2:]
        channels = weight.shape[2 if upsample else 1]
        block = native.conv2d_int8_block_rows(grid[0], grid[1], channels, kernel, stride)
        counts = block_counts(grid[0], grid[1], block, 4 if upsample else 1)
        stats = ChannelStats(torch.empty((shape[0], len(counts), 2, shape[1]), dtype=torch.float32), counts)
    packed = _packed.get(weight)  # held here: a view keeps nothing alive
    native.conv2d_int8(
        view(x),
        optional_view(skip),
        optional_view(coefficients),
        silu,
        view(packed),
        view(weight_scale),
        view(activation),
        kernel,
        stride,
        upsample,
        optional_view(bias),
        optional_view(time_shift),
        optional_view(residual),
        view(out),
        None if stats is None else view(stats.partials),
        torch.get_num_threads(),
    )
    return out if stats is None else (out, stats)
