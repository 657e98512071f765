"""CPU kernel: csrc/conv2d_int8."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from idm_fast.kernels.channel_stats import ChannelStats
from idm_fast.kernels.conv2d.contract import output_shape, stats_room
from idm_fast.kernels.conv2d.packing import PackedCache, extents
from idm_fast.kernels.conv2d_int8.quantise import NAME
from idm_fast.kernels.extension import Prepared, binder, optional_view, require_native, view

native = require_native()


def pack_weight(
    weight: Tensor,  # int8 [Cout, C, k, k] channels_last or [4, Cout, C, 2, 2]
    room: Tensor | None = None,
) -> Tensor:
    """Strips of output channels in words of four channels, and the sum of each output channel; see csrc/conv2d_int8."""
    sizes = extents(weight)
    if room is None:
        room = torch.empty(native.conv2d_int8_packed_bytes(*sizes), dtype=torch.int8, device=weight.device)
    native.conv2d_int8_pack(view(weight), *sizes, view(room))
    return room


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
    out_stats: ChannelStats | None,
) -> Tensor | tuple[Tensor, ChannelStats]:
    call = prepare(
        x, weight, weight_scale, activation, bias, stride, upsample, skip, coefficients, silu,
        time_shift, residual, with_stats, out, out_stats,
    )  # fmt: skip
    native.conv2d_int8(*call.arguments)
    result: Tensor | tuple[Tensor, ChannelStats] = call.result
    return result


def prepare(
    x: Tensor, weight: Tensor, weight_scale: Tensor, activation: Tensor, bias: Tensor | None,
    stride: int, upsample: bool, skip: Tensor | None, coefficients: Tensor | None, silu: bool,
    time_shift: Tensor | None, residual: Tensor | None, with_stats: bool, out: Tensor | None,
    out_stats: ChannelStats | None,
) -> Prepared:  # fmt: skip
    shape = output_shape(x, weight, stride, upsample)
    stats = None
    if with_stats:
        stats = stats_room(NAME, out_stats, shape, _pieces(x, weight, None, None, bias, stride, upsample), x)
    if out is None:
        out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    packed = _packed.get(weight)
    told = (
        view(x),
        optional_view(skip),
        optional_view(coefficients),
        silu,
        view(packed),
        view(weight_scale),
        view(activation),
        3 if upsample else weight.shape[-1],
        stride,
        upsample,
        optional_view(bias),
        optional_view(time_shift),
        optional_view(residual),
        view(out),
        *((None, None) if stats is None else map(view, stats)),
        torch.get_num_threads(),
    )
    return Prepared(told, out if stats is None else (out, stats), (packed,))


def _pieces(x: Tensor, weight: Tensor, _: Any, __: Any, ___: Any, stride: int, upsample: bool, *rest: Any) -> int:
    """Of the statistics of a call with these arguments."""
    _, _, rows, columns = x.shape if upsample else output_shape(x, weight, stride, upsample)
    channels, kernel = weight.shape[2 if upsample else 1], 3 if upsample else weight.shape[-1]
    block = native.conv2d_int8_block_rows(rows, columns, channels, kernel, stride)
    return (4 if upsample else 1) * -(-rows // int(block))


# What conv2d_int8_stats and bind_conv2d_int8 ask a backend for.
conv2d_int8.pieces, conv2d_int8.bind = _pieces, binder(native.conv2d_int8, prepare)  # type: ignore[attr-defined]
