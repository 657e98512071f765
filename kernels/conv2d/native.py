"""CPU kernel: csrc/conv2d."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from idm_fast.kernels.channel_stats import ChannelStats
from idm_fast.kernels.conv2d.contract import output_shape, stats_room
from idm_fast.kernels.conv2d.packing import PackedCache, pack_weight
from idm_fast.kernels.extension import _CODES, Prepared, binder, optional_view, require_native, view

native = require_native()
_packed = PackedCache(pack_weight)


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
    call = prepare(
        x, weight, bias, stride, upsample, skip, coefficients, silu, shortcut, shortcut_skip,
        shortcut_weight, time_shift, residual, with_stats, out, out_stats,
    )  # fmt: skip
    native.conv2d(*call.arguments)
    result: Tensor | tuple[Tensor, ChannelStats] = call.result
    return result


def prepare(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, upsample: bool, skip: Tensor | None,
    coefficients: Tensor | None, silu: bool, shortcut: Tensor | None, shortcut_skip: Tensor | None,
    shortcut_weight: Tensor | None, time_shift: Tensor | None, residual: Tensor | None, with_stats: bool,
    out: Tensor | None, out_stats: ChannelStats | None,
) -> Prepared:  # fmt: skip
    shape = output_shape(x, weight, stride, upsample)
    stats = None
    if with_stats:
        stats = stats_room("conv2d", out_stats, shape, _pieces(x, weight, bias, stride, upsample), x)
    if out is None:
        out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    packed = _packed.get(weight)
    packed_shortcut = None if shortcut_weight is None else _packed.get(shortcut_weight)
    told = (
        view(x),
        optional_view(skip),
        optional_view(coefficients),
        silu,
        view(packed),
        3 if upsample else weight.shape[-1],
        stride,
        upsample,
        optional_view(bias),
        optional_view(shortcut),
        optional_view(shortcut_skip),
        optional_view(packed_shortcut),
        optional_view(time_shift),
        optional_view(residual),
        view(out),
        *((None, None) if stats is None else map(view, stats)),
        torch.get_num_threads(),
    )
    keep = (packed,) if packed_shortcut is None else (packed, packed_shortcut)
    return Prepared(told, out if stats is None else (out, stats), keep)


def _pieces(x: Tensor, weight: Tensor, _: Any, stride: int, upsample: bool, *__: Any) -> int:
    """Of the statistics of a call with these arguments."""
    _, _, rows, columns = x.shape if upsample else output_shape(x, weight, stride, upsample)
    channels, kernel = weight.shape[2 if upsample else 1], 3 if upsample else weight.shape[-1]
    block = native.conv2d_block_rows(_CODES[x.dtype], rows, columns, channels, kernel, stride)
    return (4 if upsample else 1) * -(-rows // int(block))


# What conv2d_stats and bind_conv2d ask a backend for.
conv2d.pieces, conv2d.bind = _pieces, binder(native.conv2d, prepare)  # type: ignore[attr-defined]
