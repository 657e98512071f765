"""Triton kernels of group_norm_silu: channel_stats, then one launch that turns partials into coefficients and applies.

Every program of the second launch merges the partials of its own groups, which costs less than a launch in between
where they are few; else norm_coefficients runs between. No atomics, all offsets int64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from idm_fast.kernels.aot import Variant
from idm_fast.kernels.channel_stats import MAX_PIECES, ChannelStats, empty_stats
from idm_fast.kernels.channel_stats.triton_kernel import FILL, OPTIONS, channel_stats
from idm_fast.kernels.norm_coefficients.triton_kernel import (
    AOT_GROUPS,
    AOT_TYPES,
    Groups,
    affine_arguments,
    aot_constants,
    group_coefficients,
    norm_coefficients,
    pieces_of,
    statistics_arguments,
)


@dataclass(frozen=True)
class Tile:
    """Values that a program holds at a time, the most steps it takes down the rows, and its warps."""

    values: int
    steps: int
    warps: int


# Eight warps: with four the merging of partials takes more registers than ptxas gives, and it spills (Triton 3.6).
TILES = (Tile(4096, 8, 8), Tile(2048, 8, 8), Tile(2048, 4, 8), Tile(1024, 4, 8))


@triton.jit
def apply_kernel(
    partials, counts, pieces, channels1, skip_partials, skip_counts, skip_pieces, channels2,
    weight, bias, scale, shift, scale_stride, shift_stride, tile_channels, width, eps, table, x, skip, out, rows,
    HAS_SKIP: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr,
    GROUPS: tl.constexpr, CHUNK: tl.constexpr, COLS: tl.constexpr,
    FUSED: tl.constexpr, SILU: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """out = silu((x - centre) * gain + offset); the coefficients are made here (FUSED) or read from table [N, 3, C]."""
    n = tl.program_id(1).to(tl.int64)
    first = tl.program_id(2) * tile_channels
    channels = channels1 + channels2
    channel = first + tl.arange(0, COLS)
    if FUSED:
        centre, gain, offset, valid = group_coefficients(
            partials, counts, pieces, channels1, skip_partials, skip_counts, skip_pieces, channels2,
            weight, bias, scale, shift, scale_stride, shift_stride, n, first, tile_channels, width, eps,
            HAS_SKIP, HAS_WEIGHT, HAS_BIAS, HAS_SCALE, GROUPS, CHUNK, COLS,
        )  # fmt: skip
    else:
        valid = (channel < channels) & (tl.arange(0, COLS) < tile_channels)
        row_of_table = table + n * 3 * channels + channel
        centre = tl.load(row_of_table, mask=valid, other=0.0)
        gain = tl.load(row_of_table + channels, mask=valid, other=0.0)
        offset = tl.load(row_of_table + 2 * channels, mask=valid, other=0.0)
    # Only the first element of a tile is far away: inside of it 32 bits are enough.
    line = tl.arange(0, ROWS)
    for step in range(STEPS):
        # The first axis of a grid is the one that may pass 65535.
        first_row = (tl.program_id(0).to(tl.int64) * STEPS + step) * ROWS
        mask = (line < tl.minimum(rows - first_row, ROWS).to(tl.int32))[:, None] & valid[None, :]
        at = n * rows + first_row
        if HAS_SKIP:
            mine = mask & (channel < channels1)[None, :]
            value = tl.load(x + at * channels1 + (line[:, None] * channels1 + channel[None, :]), mask=mine, other=0.0)
            other = tl.load(
                skip + at * channels2 + (line[:, None] * channels2 + (channel - channels1)[None, :]),
                mask=mask & (channel >= channels1)[None, :],
                other=0.0,
            )
            value = tl.where(mine, value, other)
        else:
            value = tl.load(x + at * channels1 + (line[:, None] * channels1 + channel[None, :]), mask=mask, other=0.0)
        y = (value.to(tl.float32) - centre[None, :]) * gain[None, :] + offset[None, :]
        if SILU:
            y = y / (1.0 + tl.exp(-y))
        target = out + at * channels + (line[:, None] * channels + channel[None, :])
        tl.store(target, y.to(out.dtype.element_ty), mask=mask)


def group_norm_silu(
    x: Tensor,  # [N, C1, H, W] channels_last
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
    skip: Tensor | None,  # [N, C2, H, W] channels_last
    stats: ChannelStats | None,
    skip_stats: ChannelStats | None,
    out: Tensor,  # [N, C, H, W] channels_last
    tile: Tile = TILES[1],
) -> None:
    n, c, h, w = out.shape
    rows = h * w
    stats = _stats(x) if stats is None else stats
    skip_stats = _stats(skip) if skip is not None and skip_stats is None else skip_stats
    pieces = pieces_of(stats, skip_stats)
    groups = Groups.of(num_groups, c // num_groups, pieces)
    fused = pieces <= MAX_PIECES
    table = out  # unused, but a pointer needs a type
    if not fused:
        table = torch.empty((n, 3, c), dtype=torch.float32, device=x.device)
        norm_coefficients(stats, num_groups, weight, bias, eps, scale, shift, skip_stats, table)
    tile_rows = max(1, tile.values // groups.cols)
    others = n * triton.cdiv(c, groups.channels)
    steps = tile.steps
    while steps > 1 and others * triton.cdiv(rows, tile_rows * steps) < 2 * FILL:
        steps //= 2
    apply_kernel[(triton.cdiv(rows, tile_rows * steps), n, triton.cdiv(c, groups.channels))](
        *statistics_arguments(stats, skip_stats),
        *affine_arguments(weight, bias, scale, shift, out),
        groups.channels,
        c // num_groups,
        eps,
        table,
        x,
        x if skip is None else skip,
        out,
        rows,
        HAS_SKIP=skip is not None,
        HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None,
        HAS_SCALE=scale is not None,
        GROUPS=groups.groups,
        CHUNK=groups.chunk,
        COLS=groups.cols,
        FUSED=fused,
        SILU=silu,
        ROWS=tile_rows,
        STEPS=steps,
        num_warps=tile.warps,
        **OPTIONS,
    )


def _stats(x: Tensor) -> ChannelStats:
    room = empty_stats(x)
    channel_stats(x, room)
    return room


def _variant(x: str, t: Tile, groups: Groups, skip: bool, fused: bool = True) -> Variant:
    rows = max(1, t.values // groups.cols)
    settings = {"FUSED": fused, "SILU": True, "ROWS": rows, "STEPS": t.steps}
    label = f"{x}, {rows} x {groups.cols}, {t.steps} steps, {t.warps} warps, {groups.chunk} pieces"
    ends = f"{', one group' if groups.groups == 1 else ''}{', skip' if skip else ''}{'' if fused else ', from a table'}"
    return Variant(
        apply_kernel,
        f"{AOT_TYPES.replace('*x', f'*{x}')} *fp32 *{x} *{x} *{x} i32:16",
        {**aot_constants(groups, skip), **settings},
        {"num_warps": t.warps, **OPTIONS},
        label + ends,
    )


AOT = [
    *(_variant("bf16", tile, groups, True) for tile in TILES for groups in AOT_GROUPS),
    *(_variant(x, TILES[1], AOT_GROUPS[0], False, fused) for x in ("bf16", "fp16", "fp32") for fused in (True, False)),
]
