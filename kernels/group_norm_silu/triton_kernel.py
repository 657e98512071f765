"""Triton kernels of group_norm_silu: per-channel partials of pieces of rows -> coefficients -> apply.

Three launches, no atomics: the order of every reduction is fixed by the shape. All offsets are int64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from idm_fast.kernels.aot import Variant

ROWS = 64  # rows of a tile
OPTIONS = {"enable_fp_fusion": True}  # said aloud: the default changes in Triton 3.10, with a warning before
MAX_PIECES = 64  # pieces that one sample's rows are cut into, so that a batch of one still fills the device


@triton.jit
def partial_kernel(x, partials, rows, channels, piece_rows, ROWS: tl.constexpr, COLS: tl.constexpr):
    """(mean, M2) per channel of one piece of rows, tiles merged by Chan's formula. partials: [N, pieces, 2, C]."""
    n, piece = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
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
    target = partials + (n * tl.num_programs(1) + piece) * 2 * channels + cols
    tl.store(target, mean, mask=in_cols)
    tl.store(target + channels, m2, mask=in_cols)


@triton.jit
def coefficient_kernel(
    partials, weight, bias, scale, shift, scale_stride, shift_stride, coefficients,
    rows, channels, width, pieces, piece_rows, eps,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr,
    PIECES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Merges the partials of one group and writes (centre, gain, offset) per channel. coefficients: [N, 3, C]."""
    n, g = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    inside = tl.arange(0, WIDTH)
    channel = g * width + inside
    in_group = inside < width
    piece = tl.arange(0, PIECES)
    count = tl.minimum(rows - piece * piece_rows, piece_rows)
    count = tl.where(piece < pieces, count, 0).to(tl.float32)
    mask = (piece < pieces)[:, None] & in_group[None, :]
    source = partials + (n * pieces + piece[:, None]) * 2 * channels + channel[None, :]
    means = tl.load(source, mask=mask, other=0.0)
    m2 = tl.load(source + channels, mask=mask, other=0.0)
    elements = rows * 1.0 * width  # float32; `rows` may be a constant 1 that has no .to()
    # The shift is the first partial mean: sums of differences from it lose nothing where the mean is far from zero.
    pivot = tl.load(partials + n * pieces * 2 * channels + g * width)
    delta = tl.where(mask, means - pivot, 0.0)
    rest = tl.sum(tl.sum(delta * count[:, None], 1), 0) / elements
    delta = tl.where(mask, delta - rest, 0.0)
    squares = tl.sum(tl.sum(m2 + delta * delta * count[:, None], 1), 0)
    gain = tl.zeros((WIDTH,), tl.float32) + 1.0
    offset = tl.zeros((WIDTH,), tl.float32)
    if HAS_WEIGHT:
        gain = tl.load(weight + channel, mask=in_group, other=0.0).to(tl.float32)
    if HAS_BIAS:
        offset = tl.load(bias + channel, mask=in_group, other=0.0).to(tl.float32)
    if HAS_SCALE:
        factor = 1.0 + tl.load(scale + n * scale_stride + channel, mask=in_group, other=0.0).to(tl.float32)
        gain *= factor
        offset = offset * factor + tl.load(shift + n * shift_stride + channel, mask=in_group, other=0.0).to(tl.float32)
    gain *= 1.0 / tl.sqrt(squares / elements + eps)
    centre = pivot + rest
    left_out = (centre - pivot) - rest  # what the rounded mean misses
    target = coefficients + n * 3 * channels + channel
    tl.store(target, tl.zeros((WIDTH,), tl.float32) + centre, mask=in_group)
    tl.store(target + channels, gain, mask=in_group)
    tl.store(target + 2 * channels, offset + left_out * gain, mask=in_group)


@triton.jit
def apply_kernel(x, out, coefficients, rows, channels, SILU: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # the one axis of a grid that may pass 65535
    n = tl.program_id(1).to(tl.int64)
    cols = tl.program_id(2) * COLS + tl.arange(0, COLS)
    in_cols = cols < channels
    mask = (row < rows)[:, None] & in_cols[None, :]
    at = n * rows * channels + row[:, None] * channels + cols[None, :]
    table = coefficients + n * 3 * channels + cols
    centre = tl.load(table, mask=in_cols, other=0.0)[None, :]
    gain = tl.load(table + channels, mask=in_cols, other=0.0)[None, :]
    offset = tl.load(table + 2 * channels, mask=in_cols, other=0.0)[None, :]
    y = (tl.load(x + at, mask=mask, other=0.0).to(tl.float32) - centre) * gain + offset
    if SILU:
        y = y / (1.0 + tl.exp(-y))
    tl.store(out + at, y.to(out.dtype.element_ty), mask=mask)


def group_norm_silu(
    x: Tensor,  # [N, C, H, W] channels_last
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
    out: Tensor | None,
) -> Tensor:
    out = torch.empty_like(x) if out is None else out
    n, c, h, w = x.shape
    rows, width = h * w, c // num_groups
    tile_cols = min(triton.next_power_of_2(c), 64)
    col_tiles = triton.cdiv(c, tile_cols)
    tiles = triton.cdiv(rows, ROWS)
    piece_rows = triton.cdiv(tiles, min(tiles, MAX_PIECES)) * ROWS
    pieces = triton.cdiv(rows, piece_rows)
    partials = torch.empty((n, pieces, 2, c), dtype=torch.float32, device=x.device)
    coefficients = torch.empty((n, 3, c), dtype=torch.float32, device=x.device)
    partial_kernel[(n, pieces, col_tiles)](x, partials, rows, c, piece_rows, ROWS=ROWS, COLS=tile_cols, **OPTIONS)
    coefficient_kernel[(n, num_groups)](
        partials,
        x if weight is None else weight,  # an unused pointer still needs a type
        x if bias is None else bias,
        x if scale is None else scale,
        x if shift is None else shift,
        0 if scale is None else scale.stride(0),
        0 if shift is None else shift.stride(0),
        coefficients,
        rows,
        c,
        width,
        pieces,
        piece_rows,
        eps,
        HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None,
        HAS_SCALE=scale is not None,
        PIECES=triton.next_power_of_2(pieces),
        WIDTH=triton.next_power_of_2(width),
        **OPTIONS,
    )
    apply_kernel[(tiles, n, col_tiles)](x, out, coefficients, rows, c, SILU=silu, ROWS=ROWS, COLS=tile_cols, **OPTIONS)
    return out


AOT = [
    variant
    for x in ("bf16", "fp16", "fp32")
    for variant in (
        Variant(partial_kernel, f"*{x} *fp32 i32 i32:16 i32:16", {"ROWS": ROWS, "COLS": 64}, OPTIONS),
        Variant(
            coefficient_kernel,
            f"*fp32 *{x} *{x} *{x} *{x} i32:16 i32:16 *fp32 i32 i32:16 i32 i32 i32:16 fp32",
            {"HAS_WEIGHT": True, "HAS_BIAS": True, "HAS_SCALE": True, "PIECES": MAX_PIECES, "WIDTH": 16},
            OPTIONS,
        ),
        Variant(apply_kernel, f"*{x} *{x} *fp32 i32 i32:16", {"SILU": True, "ROWS": ROWS, "COLS": 64}, OPTIONS),
    )
]
