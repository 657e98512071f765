"""CUDA kernels: csrc/conv2d/conv2d.cu."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from idm_fast.kernels.channel_stats import ChannelStats
from idm_fast.kernels.conv2d.contract import Shape, output_shape
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
    plan: tuple[int, int] | None = None,  # (tile, splits); None: as the native rule says
) -> Tensor | tuple[Tensor, ChannelStats]:
    shape = output_shape(x, weight, stride, upsample)
    n, cout, ho, wo = shape
    if out is None:
        out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    grid = (4, x.shape[2], x.shape[3]) if upsample else (1, ho, wo)  # phases, rows, columns
    if plan is None:
        channels = tuple(t.shape[1] for t in (x, skip, shortcut, shortcut_skip) if t is not None)
        plan = _plan(shape, grid, channels, weight.shape[-1], stride)
    tile, splits = plan
    stats = workspace = None
    if with_stats:
        pieces = native.conv2d_cuda_pieces(tile, *grid)
        partials = torch.empty((n, pieces, 2, cout), dtype=torch.float32, device=x.device)
        stats = ChannelStats(partials, torch.empty((pieces,), dtype=torch.float32, device=x.device))
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


@lru_cache(maxsize=1024)
def _plan(
    shape: Shape, grid: tuple[int, int, int], channels: tuple[int, ...], side: int, stride: int
) -> tuple[int, int]:
    chunks = sum(-(-count // CHUNK) for count in channels)
    tile, splits = native.conv2d_cuda_plan(shape[0], *grid, shape[1], chunks, side, stride)
    return tile, splits
