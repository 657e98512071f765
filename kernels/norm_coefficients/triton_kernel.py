"""Triton kernels of norm_coefficients. No atomics: the order of every sum is fixed by the shape."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from idm_fast.kernels.aot import Variant
from idm_fast.kernels.channel_stats import ChannelStats

OPTIONS = {"enable_fp_fusion": True}  # said aloud: the default changes in Triton 3.10, with a warning before
TILE_COLS = 64  # channels of the whole groups that a program takes, where a group is not wider
TILE_GROUPS = 16  # groups, at most: every one of them looks at every channel
TILE_VALUES = 2048  # partials in registers at a time


@triton.jit
def merge_pieces(partials, counts, pieces, channels, channel, inside, CHUNK: tl.constexpr, COLS: tl.constexpr):
    """(mean [COLS], M2 [COLS], count) of the channels over all pieces. partials: [P, 2, C]."""
    count = tl.zeros((), tl.float32)
    mean = tl.zeros((COLS,), tl.float32)
    m2 = tl.zeros((COLS,), tl.float32)
    for first in range(0, pieces, CHUNK):
        piece = first + tl.arange(0, CHUNK)
        there = piece < pieces
        mask = there[:, None] & inside[None, :]
        weights = tl.load(counts + piece, mask=there, other=0.0)
        at = partials + piece.to(tl.int64)[:, None] * 2 * channels + channel[None, :]
        means = tl.load(at, mask=mask, other=0.0)
        squares = tl.load(at + channels, mask=mask, other=0.0)
        # Differences from one of the means: their sum loses nothing where the mean is far from zero.
        pivot = tl.load(partials + (first + tl.zeros((), tl.int64)) * 2 * channels + channel, mask=inside, other=0.0)
        seen = tl.sum(weights, 0)
        delta = tl.where(mask, means - pivot[None, :], 0.0)
        rest = tl.sum(delta * weights[:, None], 0) / seen
        delta = tl.where(mask, delta - rest[None, :], 0.0)
        total = count + seen
        step = (pivot - mean) + rest
        mean += step * (seen / total)
        m2 += tl.sum(squares + delta * delta * weights[:, None], 0) + step * step * (count * seen / total)
        count = total
    return mean, m2, count


@triton.jit
def group_coefficients(
    partials, counts, pieces, channels1, skip_partials, skip_counts, skip_pieces, channels2,
    weight, bias, scale, shift, scale_stride, shift_stride, n, first, tile_channels, width, eps,
    HAS_SKIP: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr,
    GROUPS: tl.constexpr, CHUNK: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """(centre, gain, offset) [COLS] of sample n's channels from ``first``, where a group begins, and which exist."""
    local = tl.arange(0, COLS)
    channel = first + local
    valid = (local < tile_channels) & (channel < channels1 + channels2)
    mine = valid & (channel < channels1)
    base = partials + n * pieces * 2 * channels1
    if HAS_SKIP:
        mean, m2, count = merge_pieces(
            base, counts, tl.where(first < channels1, pieces, 0), channels1, channel, mine, CHUNK, COLS
        )
        beyond = tl.where(first + tile_channels > channels1, skip_pieces, 0)
        mean2, m22, count2 = merge_pieces(
            skip_partials + n * skip_pieces * 2 * channels2, skip_counts, beyond, channels2, channel - channels1,
            valid & (channel >= channels1), CHUNK, COLS,
        )  # fmt: skip
        mean = tl.where(mine, mean, mean2)
        m2 = tl.where(mine, m2, m22)
        count = tl.maximum(count, count2)
    else:
        mean, m2, count = merge_pieces(base, counts, pieces, channels1, channel, mine, CHUNK, COLS)
    # Sums over the channels of a group; `where`, not a product, keeps a NaN in its own group.
    if GROUPS == 1:
        pivot = tl.sum(tl.where(local == 0, mean, 0.0), 0)
        delta = tl.where(valid, mean - pivot, 0.0)
        rest = tl.sum(delta, 0) / width
        delta = delta - rest
        squares = tl.sum(tl.where(valid, m2 + delta * delta * count, 0.0), 0)
        centre = pivot + rest
        left_out = (centre - pivot) - rest  # what the rounded mean misses
        rstd = 1.0 / tl.sqrt(squares / (count * width) + eps)
        centre = tl.zeros((COLS,), tl.float32) + centre
    else:
        same = (tl.arange(0, GROUPS)[:, None] == (local // width)[None, :]) & valid[None, :]
        pivots = tl.sum(tl.where(same & (local % width == 0)[None, :], mean[None, :], 0.0), 1)
        delta = tl.where(same, mean[None, :] - pivots[:, None], 0.0)
        rests = tl.sum(delta, 1) / width
        delta = delta - rests[:, None]
        squares = tl.sum(tl.where(same, m2[None, :] + delta * delta * count, 0.0), 1)
        centres = pivots + rests
        # To every channel the values of its group.
        centre = tl.sum(tl.where(same, centres[:, None], 0.0), 0)
        left_out = tl.sum(tl.where(same, ((centres - pivots) - rests)[:, None], 0.0), 0)
        rstd = tl.sum(tl.where(same, (1.0 / tl.sqrt(squares / (count * width) + eps))[:, None], 0.0), 0)
    gain = tl.zeros((COLS,), tl.float32) + 1.0
    offset = tl.zeros((COLS,), tl.float32)
    if HAS_WEIGHT:
        gain = tl.load(weight + channel, mask=valid, other=0.0).to(tl.float32)
    if HAS_BIAS:
        offset = tl.load(bias + channel, mask=valid, other=0.0).to(tl.float32)
    if HAS_SCALE:
        factor = 1.0 + tl.load(scale + n * scale_stride + channel, mask=valid, other=0.0).to(tl.float32)
        gain *= factor
        offset = offset * factor + tl.load(shift + n * shift_stride + channel, mask=valid, other=0.0).to(tl.float32)
    gain *= rstd
    return centre, gain, offset + left_out * gain, valid


@triton.jit
def coefficient_kernel(
    partials, counts, pieces, channels1, skip_partials, skip_counts, skip_pieces, channels2,
    weight, bias, scale, shift, scale_stride, shift_stride, tile_channels, width, eps, table,
    HAS_SKIP: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr,
    GROUPS: tl.constexpr, CHUNK: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """table: [N, 3, C]."""
    n = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * tile_channels
    centre, gain, offset, valid = group_coefficients(
        partials, counts, pieces, channels1, skip_partials, skip_counts, skip_pieces, channels2,
        weight, bias, scale, shift, scale_stride, shift_stride, n, first, tile_channels, width, eps,
        HAS_SKIP, HAS_WEIGHT, HAS_BIAS, HAS_SCALE, GROUPS, CHUNK, COLS,
    )  # fmt: skip
    channels = channels1 + channels2
    target = table + n * 3 * channels + first + tl.arange(0, COLS)
    tl.store(target, centre, mask=valid)
    tl.store(target + channels, gain, mask=valid)
    tl.store(target + 2 * channels, offset, mask=valid)


@dataclass(frozen=True)
class Groups:
    """What a program takes: ``channels`` of whole groups, ``chunk`` pieces at a time; ``cols`` and ``groups`` lanes."""

    channels: int
    cols: int
    groups: int
    chunk: int

    @classmethod
    def of(cls, num_groups: int, width: int, pieces: int) -> Groups:
        each = max(1, min(num_groups, TILE_GROUPS, TILE_COLS // width))
        cols = triton.next_power_of_2(each * width)
        chunk = min(triton.next_power_of_2(pieces), max(2, TILE_VALUES // cols))
        return cls(each * width, cols, triton.next_power_of_2(each), chunk)


def pieces_of(stats: ChannelStats, skip_stats: ChannelStats | None) -> int:
    return max(part.partials.shape[1] for part in (stats, skip_stats) if part is not None)


def statistics_arguments(stats: ChannelStats, skip_stats: ChannelStats | None) -> tuple[Any, ...]:
    """The first eight arguments of the kernels; an unused pointer still needs a type."""
    other = stats if skip_stats is None else skip_stats
    first = (stats.partials, stats.counts, stats.partials.shape[1], stats.partials.shape[3])
    last_channels = 0 if skip_stats is None else skip_stats.partials.shape[3]
    return (*first, other.partials, other.counts, other.partials.shape[1], last_channels)


def affine_arguments(
    weight: Tensor | None, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None, unused: Tensor
) -> tuple[Any, ...]:
    """The next six."""
    pointers = [unused if tensor is None else tensor for tensor in (weight, bias, scale, shift)]
    strides = [0 if tensor is None else tensor.stride(0) for tensor in (scale, shift)]
    return (*pointers, *strides)


def norm_coefficients(
    stats: ChannelStats,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    skip_stats: ChannelStats | None,
    out: Tensor,  # [N, 3, C]
) -> None:
    n, _, c = out.shape
    groups = Groups.of(num_groups, c // num_groups, pieces_of(stats, skip_stats))
    coefficient_kernel[(n, triton.cdiv(c, groups.channels))](
        *statistics_arguments(stats, skip_stats),
        *affine_arguments(weight, bias, scale, shift, out),
        groups.channels,
        c // num_groups,
        eps,
        out,
        HAS_SKIP=skip_stats is not None,
        HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None,
        HAS_SCALE=scale is not None,
        GROUPS=groups.groups,
        CHUNK=groups.chunk,
        COLS=groups.cols,
        num_warps=8,
        **OPTIONS,
    )


# The arguments that this kernel and that of group_norm_silu begin with; *x stands for the parameters' type.
AOT_TYPES = "*fp32 *fp32 i32 i32:16 *fp32 *fp32 i32 i32:16 *x *x *x *x i32:16 i32:16 i32 i32 fp32"
AOT_GROUPS = (Groups.of(32, 4, 64), Groups.of(1, 512, 64))


def aot_constants(groups: Groups, skip: bool) -> dict[str, Any]:
    given = dict.fromkeys(("HAS_WEIGHT", "HAS_BIAS", "HAS_SCALE"), True)
    return {"HAS_SKIP": skip, **given, "GROUPS": groups.groups, "CHUNK": groups.chunk, "COLS": groups.cols}


AOT = [
    Variant(
        coefficient_kernel,
        f"{AOT_TYPES.replace('*x', f'*{x}')} *fp32",
        aot_constants(groups, skip),
        {"num_warps": 8, **OPTIONS},
        f"{x}, {groups.cols} channels, {groups.chunk} pieces{', skip' if skip else ''}",
    )
    for groups in AOT_GROUPS
    for x, skip in (("bf16", True), ("fp16", False), ("fp32", False))
]
