"""CUDA kernels: csrc/conv2d/conv2d.cu."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from idm_fast.kernels.channel_stats import ChannelStats
from idm_fast.kernels.conv2d.contract import Shape, output_shape, stats_room
from idm_fast.kernels.extension import cuda_stream, optional_view, require_cuda, view

native = require_cuda()
CHUNK = 32  # channels of one step of the sum


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
    plan: tuple[int, int] | None = None,  # (tile, splits); None: as the native rule says
) -> Tensor | tuple[Tensor, ChannelStats]:
    shape = output_shape(x, weight, stride, upsample)
    n, cout, ho, wo = shape
    grid = grid_of(x, shape, upsample)
    tile, splits = _plan(shape, grid, channels_of(x, skip, shortcut, shortcut_skip), weight.shape[-1], stride, plan)
    stats = workspace = None
    if with_stats:
        stats = stats_room("conv2d", out_stats, shape, native.conv2d_cuda_pieces(tile, *grid), x)
    if out is None:
        out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    if splits > 1:
        workspace = torch.empty((splits, n, ho, wo, cout), dtype=torch.float32, device=x.device)
    native.conv2d_cuda(
        view(x),
        optional_view(skip),
        optional_view(coefficients),
        silu,
        view(weight),
        stride,
        upsample,
        optional_view(bias),
        optional_view(shortcut),
        optional_view(shortcut_skip),
        optional_view(shortcut_weight),
        optional_view(time_shift),
        optional_view(residual),
        view(out),
        None if stats is None else view(stats.partials),
        None if stats is None else view(stats.counts),
        optional_view(workspace),
        tile,
        splits,
        cuda_stream(x),
    )
    return out if stats is None else (out, stats)


def channels_of(*images: Tensor | None) -> tuple[int, ...]:
    return tuple(image.shape[1] for image in images if image is not None)


def grid_of(x: Tensor, shape: Shape, upsample: bool) -> tuple[int, int, int]:
    """(phases, rows, columns) of the positions that are cut into tiles."""
    return (4, x.shape[2], x.shape[3]) if upsample else (1, shape[2], shape[3])


def _pieces(x: Tensor, weight: Tensor, _: Any, stride: int, upsample: bool, *rest: Any) -> int:
    """Of the statistics of a call with these arguments."""
    skip, _, _, shortcut, shortcut_skip, *_ = rest
    shape = output_shape(x, weight, stride, upsample)
    grid, channels = grid_of(x, shape, upsample), channels_of(x, skip, shortcut, shortcut_skip)
    tile, _ = _plan(shape, grid, channels, weight.shape[-1], stride, None)
    return int(native.conv2d_cuda_pieces(tile, *grid))


conv2d.pieces = _pieces  # type: ignore[attr-defined]  # what conv2d_stats asks a backend for


@lru_cache(maxsize=1024)
def _plan(
    shape: Shape,
    grid: tuple[int, int, int],
    channels: tuple[int, ...],
    side: int,
    stride: int,
    plan: tuple[int, int] | None,
) -> tuple[int, int]:
    if plan is not None:
        return plan
    chunks = sum(-(-count // CHUNK) for count in channels)
    tile, splits = native.conv2d_cuda_plan(shape[0], *grid, shape[1], chunks, side, stride)
    return tile, splits
