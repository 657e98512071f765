"""Triton kernel of channel_stats. No atomics: the order of every sum is fixed by the shape. All offsets are int64."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from idm_fast.kernels.aot import Variant
from idm_fast.kernels.channel_stats import ChannelStats, piece_rows, pieces

OPTIONS = {"enable_fp_fusion": True}  # said aloud: the default changes in Triton 3.10, with a warning before
FILL = 132  # programs that occupy every multiprocessor of an H100


@dataclass(frozen=True)
class Tile:
    """Positions and channels that a program holds at a time, and its warps."""

    rows: int
    cols: int
    warps: int


# Widest first. Sixteen 16-bit channels are one sector of memory, the least that is read anyway.
TILES = (Tile(64, 64, 4), Tile(64, 32, 4), Tile(64, 16, 2))


@triton.jit
def partial_kernel(
    x, partials, counts, rows, channels, piece_rows, ROWS: tl.constexpr, COLS: tl.constexpr
):  # fmt: skip
    """(mean, M2) per channel of one piece of rows, tiles merged by Chan's formula. partials: [N, P, 2, C]."""
    piece, n = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    cols = tl.program_id(2) * COLS + tl.arange(0, COLS)
    in_cols = cols < channels
    first = piece * piece_rows
    last = tl.minimum(first + piece_rows, rows)
    base = x + n * rows * channels
    count = tl.zeros((), tl.float32)
    mean = tl.zeros((COLS,), tl.float32)
    m2 = tl.zeros((COLS,), tl.float32)
    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < last)[:, None] & in_cols[None, :]
        tile = tl.load(base + row[:, None] * channels + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        seen = tl.minimum(last - start, ROWS).to(tl.float32)
        # A first mean in float32, then what it missed: the second sum is of small numbers.
        rough = tl.sum(tile, 0) / seen
        rest = tl.where(mask, tile - rough[None, :], 0.0)
        miss = tl.sum(rest, 0) / seen
        rest = tl.where(mask, rest - miss[None, :], 0.0)
        tile_m2 = tl.sum(rest * rest, 0)
        total = count + seen
        delta = (rough - mean) + miss
        mean += delta * (seen / total)
        m2 += tile_m2 + delta * delta * (count * seen / total)
        count = total
    target = partials + (n * tl.num_programs(0) + piece) * 2 * channels + cols
    tl.store(target, mean, mask=in_cols)
    tl.store(target + channels, m2, mask=in_cols)
    tl.store(counts + piece, count, mask=(n == 0) & (tl.program_id(2) == 0))


def tile_of(programs: int, channels: int) -> Tile:
    """The widest tile that is not mostly padding and with which ``programs`` x (tiles of channels) fill a device."""
    fitting = [tile for tile in TILES if tile.cols < 2 * channels] or [TILES[-1]]
    return next((tile for tile in fitting if programs * -(-channels // tile.cols) >= FILL), fitting[-1])


def channel_stats(
    x: Tensor,  # [N, C, H, W] channels_last
    out: ChannelStats,
    tile: Tile | None = None,  # one of TILES, or the choice made here
) -> None:
    n, c, h, w = x.shape
    rows = h * w
    tile = tile or tile_of(n * pieces(rows), c)
    partial_kernel[(pieces(rows), n, triton.cdiv(c, tile.cols))](
        x, out.partials, out.counts, rows, c, piece_rows(rows), ROWS=tile.rows, COLS=tile.cols, num_warps=tile.warps,
        **OPTIONS,
    )  # fmt: skip


AOT = [
    Variant(
        partial_kernel,
        f"*{x} *fp32 *fp32 i32 i32:16 i32",
        {"ROWS": tile.rows, "COLS": tile.cols},
        {"num_warps": tile.warps, **OPTIONS},
    )
    for x in ("bf16", "fp16", "fp32")
    for tile in TILES
]
