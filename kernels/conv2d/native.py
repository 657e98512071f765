"""CPU kernel: csrc/conv2d."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from idm_fast.kernels.channel_stats import ChannelStats
from idm_fast.kernels.conv2d.contract import output_shape
from idm_fast.kernels.conv2d.packing import PackedCache, pack_weight
from idm_fast.kernels.extension import _CODES, optional_view, require_native, view

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
) -> Tensor | tuple[Tensor, ChannelStats]:
    shape = output_shape(x, weight, stride, upsample)
    if out is None:
        out = torch.empty(shape, dtype=x.dtype, memory_format=torch.channels_last)
    kernel = 3 if upsample else weight.shape[-1]
    stats = None
    if with_stats:
        grid = x.shape[2:] if upsample else shape[2:]
        channels = weight.shape[2 if upsample else 1]
        block = native.conv2d_block_rows(_CODES[x.dtype], grid[0], grid[1], channels, kernel, stride)
        counts = block_counts(grid[0], grid[1], block, 4 if upsample else 1)
        stats = ChannelStats(torch.empty((shape[0], len(counts), 2, shape[1]), dtype=torch.float32), counts)
    packed = _packed.get(weight)  # held here: a view keeps nothing alive
    packed_shortcut = None if shortcut_weight is None else _packed.get(shortcut_weight)
    native.conv2d(
        view(x),
        optional_view(skip),
        optional_view(coefficients),
        silu,
        view(packed),
        kernel,
        stride,
        upsample,
        optional_view(bias),
        optional_view(shortcut),
        optional_view(shortcut_skip),
        optional_view(packed_shortcut),
        optional_view(time_shift),
        optional_view(residual),
        view(out),
        None if stats is None else view(stats.partials),
        torch.get_num_threads(),
    )
    return out if stats is None else (out, stats)


@lru_cache(maxsize=256)
def block_counts(rows: int, cols: int, block: int, phases: int) -> Tensor:
    """Positions of each piece of the native statistics: blocks of ``block`` rows, each once per phase."""
    sizes = [min(block, rows - first) * cols for first in range(0, rows, block) for _ in range(phases)]
    with torch.inference_mode(False):
        return torch.tensor(sizes, dtype=torch.float32)
