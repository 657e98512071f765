"""Triton implicit GEMM on e4m3: the tiles and the epilogue of conv2d's kernel, the activation quantised in registers.

Without split sums and shortcuts (which ``conv2d_fp8`` has not). Offsets into tensors are int64.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from idm_fast.kernels.aot import Variant
from idm_fast.kernels.channel_stats import ChannelStats
from idm_fast.kernels.conv2d.contract import output_shape, stats_room
from idm_fast.kernels.conv2d.tiles import Config, multiprocessors
from idm_fast.kernels.conv2d.triton_kernel import OPTIONS, finish, placed
from idm_fast.kernels.conv2d_fp8.quantise import LARGEST, NAME

# From the largest tile to the smallest: 64 channels of one byte are what 32 are to conv2d.
ALIGNED = (Config(128, 128, 64, 8, 3), Config(128, 64, 64, 8, 3), Config(64, 64, 64, 4, 3), Config(64, 32, 64, 4, 3))
# Loads of single values need a pointer each: few at a time. A product of e4m3 takes 32 channels at least.
UNALIGNED = (Config(64, 32, 32, 4, 2),)
PLAIN = ["samples", "height", "width", "rows", "columns", "time_stride", "scale_stride"]


@triton.jit
def nearest_e4m3(v):
    """What a device's conversion gives, as float32, for |v| <= 448: the interpreter's own cuts off instead."""
    bits = v.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & ~0xFFFFF).to(tl.float32, bitcast=True)  # to 3 bits, ties to even
    small = (v + 24576.0) - 24576.0  # below 2^-6 the spacing is 2^-9
    return tl.where(tl.abs(v) < 0.015625, small, normal)


@triton.jit(do_not_specialize=PLAIN)
def conv_kernel(
    x, skip, weight, weight_scale, activation, bias, coefficients, time_shift, residual, out, partials, counts,
    samples, height, width, rows, columns, c1, c2, cout, time_stride, scale_stride,
    SIDE: tl.constexpr, STRIDE: tl.constexpr, UPSAMPLE: tl.constexpr, NORM: tl.constexpr, SILU: tl.constexpr,
    HAS_SKIP: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_TIME: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    STATS: tl.constexpr, LARGEST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """rows x columns: the positions of one phase. SIDE: of the taps, 2 for a phase. scale_stride: 0 or 1."""
    PHASES: tl.constexpr = 4 if UPSAMPLE else 1
    TAPS: tl.constexpr = SIDE * SIDE
    col_tiles = tl.cdiv(cout, BLOCK_N)
    tiles = tl.cdiv(rows * columns, BLOCK_M)
    pid = tl.program_id(0)
    col_tile, pid = pid % col_tiles, pid // col_tiles
    tile, pid = pid % tiles, pid // tiles
    phase, n = pid % PHASES, (pid // PHASES).to(tl.int64)
    position = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    in_row = position < rows * columns
    row, column, place = placed(position, phase, rows, columns, UPSAMPLE)
    places = rows.to(tl.int64) * columns * PHASES
    cols = col_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    in_cols = cols < cout
    all_c = c1 + c2
    top, left = row * STRIDE - SIDE // 2, column * STRIDE - SIDE // 2
    scales = weight_scale + cols
    if UPSAMPLE:  # a phase of parity p starts at i + p - 1
        top, left = row + phase // 2 - 1, column + phase % 2 - 1
        weight += phase.to(tl.int64) * cout * 4 * all_c
        scales += phase * cout
    step_size = tl.load(activation + n * scale_stride)
    inverse = 1.0 / step_size
    pixels = height.to(tl.int64) * width
    skip_begin = TAPS * tl.cdiv(c1, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(skip_begin + TAPS * tl.cdiv(c2, BLOCK_K)):
        source, channels, before, local = x, c1, 0, step
        if HAS_SKIP:
            in_skip = step >= skip_begin
            source = tl.where(in_skip, skip, source)
            channels = tl.where(in_skip, c2, channels)
            before = tl.where(in_skip, c1, before)
            local = tl.where(in_skip, step - skip_begin, local)
        tap = local % TAPS
        r, c = top + tap // SIDE, left + tap % SIDE
        channel = local // TAPS * BLOCK_K + tl.arange(0, BLOCK_K)
        in_channel = channel < channels
        mask = (in_row & (r >= 0) & (r < height) & (c >= 0) & (c < width))[:, None] & in_channel[None, :]
        pixel = n * pixels + r.to(tl.int64) * width + c
        a = tl.load(source + (pixel * channels)[:, None] + channel[None, :], mask=mask, other=0.0).to(tl.float32)
        b = tl.load(
            weight + (cols.to(tl.int64) * (TAPS * all_c))[None, :] + (tap * all_c + before + channel)[:, None],
            mask=in_channel[:, None] & in_cols[None, :],
            other=0.0,
        )
        if NORM:
            table = coefficients + n * 3 * all_c + before + channel
            centre = tl.load(table, mask=in_channel, other=0.0)[None, :]
            gain = tl.load(table + all_c, mask=in_channel, other=0.0)[None, :]
            offset = tl.load(table + 2 * all_c, mask=in_channel, other=0.0)[None, :]
            a = tl.where(mask, (a - centre) * gain + offset, 0.0)  # padding is 0 after the prologue
            if SILU:
                a = a / (1.0 + tl.exp(tl.minimum(-a, 88.0)))  # beyond, the interpreter warns of an infinity
        q = tl.clamp(a * inverse, -LARGEST, LARGEST, propagate_nan=tl.PropagateNan.ALL)
        if WIDEN:
            acc = tl.dot(nearest_e4m3(q), b.to(tl.float32), acc, input_precision="ieee")
        else:
            # The units keep some 14 bits of a sum: after each step it is added to one that has all of float32.
            acc = tl.dot(q.to(tl.float8e4nv), b, acc, max_num_imprecise_acc=BLOCK_K)
    acc *= (tl.load(scales, mask=in_cols, other=0.0) * step_size)[None, :]
    count = tl.minimum(rows * columns - tile * BLOCK_M, BLOCK_M)
    finish(
        acc, n, phase * tiles + tile, PHASES * tiles, count, place, places, in_row, cols, in_cols, cout,
        bias, time_shift, time_stride, residual, out, partials, counts, HAS_BIAS, HAS_TIME, HAS_RESIDUAL, STATS,
    )  # fmt: skip


def conv2d_fp8(
    x: Tensor,  # [N, C1, H, W] channels_last
    weight: Tensor,  # e4m3 [Cout, C, k, k] channels_last or [4, Cout, C, 2, 2]
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
    config: Config | None = None,
) -> Tensor | tuple[Tensor, ChannelStats]:
    shape = n, cout, ho, wo = output_shape(x, weight, stride, upsample)
    phases, rows, columns = (4, x.shape[2], x.shape[3]) if upsample else (1, ho, wo)
    c1, c2 = x.shape[1], 0 if skip is None else skip.shape[1]
    config = config or _choose(x, c1, c2, n * phases, rows * columns, cout)
    pieces = phases * triton.cdiv(rows * columns, config.m)
    partials, counts = stats_room(NAME, out_stats, shape, pieces, x) if with_stats else (x, x)
    if out is None:
        out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)

    def given(tensor: Tensor | None) -> Tensor:
        return x if tensor is None else tensor

    conv_kernel[(triton.cdiv(cout, config.n) * pieces * n,)](
        x, given(skip), weight, weight_scale, activation, given(bias), given(coefficients), given(time_shift),
        given(residual), out, partials, counts, n, x.shape[2], x.shape[3], rows, columns, c1, c2, cout,
        0 if time_shift is None else time_shift.stride(0), int(len(activation) > 1),
        SIDE=weight.shape[-1], STRIDE=stride, UPSAMPLE=upsample, NORM=coefficients is not None, SILU=silu,
        HAS_SKIP=skip is not None, HAS_BIAS=bias is not None, HAS_TIME=time_shift is not None,
        HAS_RESIDUAL=residual is not None, STATS=with_stats, LARGEST=LARGEST, BLOCK_M=config.m, BLOCK_N=config.n,
        BLOCK_K=config.k, WIDEN=not x.is_cuda,  # the interpreter does not round to e4m3
        num_warps=config.warps, num_stages=config.stages, **OPTIONS,
    )  # fmt: skip
    return (out, ChannelStats(partials, counts)) if with_stats else out


def _choose(x: Tensor, c1: int, c2: int, images: int, positions: int, cout: int) -> Config:
    """The largest tile that gives every multiprocessor one, else the smallest."""
    if c1 % 16 or c2 % 16 or x.element_size() != 2:
        return UNALIGNED[0]
    for config in ALIGNED:
        programs = images * triton.cdiv(positions, config.m) * triton.cdiv(cout, config.n)
        if config.n < 2 * cout and programs >= multiprocessors(x.device):
            return config
    return ALIGNED[-1]


def _pieces(x: Tensor, weight: Tensor, _: Any, __: Any, ___: Any, stride: int, upsample: bool, *rest: Any) -> int:
    """Of the statistics of a call with these arguments."""
    n, cout, ho, wo = output_shape(x, weight, stride, upsample)
    phases, positions = (4, x.shape[2] * x.shape[3]) if upsample else (1, ho * wo)
    config = _choose(x, x.shape[1], 0 if rest[0] is None else rest[0].shape[1], n * phases, positions, cout)
    return phases * triton.cdiv(positions, config.m)


conv2d_fp8.pieces = _pieces  # type: ignore[attr-defined]  # what conv2d_fp8_stats asks a backend for


def _variant(dtype: str, form: str, c: Config, channels: str = "i32:16") -> Variant:
    full = form == "all"
    t = f"*{dtype}"
    constants = {
        "SIDE": {"all": 3, "1x1": 1, "phases": 2}[form], "STRIDE": 1, "UPSAMPLE": form == "phases",
        "NORM": form != "phases", "SILU": full, "HAS_SKIP": full, "HAS_BIAS": True, "HAS_TIME": full,
        "HAS_RESIDUAL": full, "STATS": full, "LARGEST": LARGEST, "BLOCK_M": c.m, "BLOCK_N": c.n, "BLOCK_K": c.k,
        "WIDEN": False,
    }  # fmt: skip
    types = f"{t} {t} *fp8e4nv *fp32 *fp32 {t} *fp32 {t} {t} {t} *fp32 *fp32 " + "i32 " * 5 + f"{channels} " * 3
    label = f"{dtype}, {form}, {c.m} x {c.n} x {c.k}, {c.warps} warps, {c.stages} stages"
    label += ", unaligned" if channels == "i32" else ""
    options = {"num_warps": c.warps, "num_stages": c.stages, **OPTIONS}
    return Variant(conv_kernel, types + "i32 i32", constants, options, label, least=89)


AOT = [
    *(_variant("bf16", "all", config) for config in ALIGNED),
    *(_variant("bf16", form, ALIGNED[0]) for form in ("1x1", "phases")),
    *(_variant(dtype, "all", config, "i32") for config in UNALIGNED for dtype in ("bf16", "fp32")),
]
