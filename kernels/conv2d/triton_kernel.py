"""Triton implicit GEMM: one program makes a tile of positions of one sample x output channels.

The sum runs over the taps and channels of x, of the skip, and of the shortcut's two tensors, each from its own
pointer: concatenations exist only in the order of the steps. Offsets into tensors are int64.

The prologue runs once per tap, nine times a value. Staging the activated patch of a K block once, as the CUDA kernel
does, needs shifted windows of shared memory, which Triton cannot express, and a scratch in global memory would be the
very pass that the fusion removes. Which of the two forms wins is for a measurement on a device to say.
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
from idm_fast.kernels.conv2d.tiles import FLOAT, HALF, UNALIGNED, Config, Problem, choose

OPTIONS = {"enable_fp_fusion": True}  # said aloud: the default changes in Triton 3.10, with a warning before


@triton.jit
def finish(
    acc, n, piece, pieces, count, place, places, in_row, cols, in_cols, cout,
    bias, time_shift, time_stride, residual, out, partials, counts,
    HAS_BIAS: tl.constexpr, HAS_TIME: tl.constexpr, HAS_RESIDUAL: tl.constexpr, STATS: tl.constexpr,
):  # fmt: skip
    """Adds what is added, stores one tile, and writes the (mean, M2) of what it stored."""
    mask = in_row[:, None] & in_cols[None, :]
    at = (n * places + place)[:, None] * cout + cols[None, :]
    if HAS_BIAS:
        acc += tl.load(bias + cols, mask=in_cols, other=0.0).to(tl.float32)[None, :]
    if HAS_TIME:
        acc += tl.load(time_shift + n * time_stride + cols, mask=in_cols, other=0.0).to(tl.float32)[None, :]
    if HAS_RESIDUAL:
        acc += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    stored = acc.to(out.dtype.element_ty)
    tl.store(out + at, stored, mask=mask)
    if STATS:
        value = stored.to(tl.float32)
        seen = count.to(tl.float32)
        # A first mean in float32, then what it missed: the second sum is of small numbers.
        rough = tl.sum(tl.where(mask, value, 0.0), 0) / seen
        rest = tl.where(mask, value - rough[None, :], 0.0)
        miss = tl.sum(rest, 0) / seen
        rest = tl.where(mask, rest - miss[None, :], 0.0)
        table = partials + (n * pieces + piece) * 2 * cout + cols
        tl.store(table, rough + miss, mask=in_cols)
        tl.store(table + cout, tl.sum(rest * rest, 0), mask=in_cols)
        if n == 0:
            tl.store(counts + piece, seen)  # every column of programs writes the same number


@triton.jit
def placed(position, phase, rows, columns, UPSAMPLE: tl.constexpr):
    """(row, column of the result / of the phase's grid, place in the whole result) of positions of one phase."""
    row, column = position // columns, position % columns
    place = position.to(tl.int64)
    if UPSAMPLE:
        place = (2 * row + phase // 2).to(tl.int64) * (2 * columns) + 2 * column + phase % 2
    return row, column, place


# A 1 is a constant to Triton unless it is told otherwise, and a constant has no .to().
PLAIN = ["samples", "height", "width", "rows", "columns", "split_steps", "splits", "time_stride"]


@triton.jit(do_not_specialize=PLAIN)
def conv_kernel(
    x, skip, weight, bias, coefficients, shortcut, shortcut_skip, shortcut_weight, time_shift, residual,
    out, partials, counts, workspace,
    samples, height, width, rows, columns, c1, c2, cs1, cs2, cout, time_stride, split_steps,
    SIDE: tl.constexpr, STRIDE: tl.constexpr, UPSAMPLE: tl.constexpr, NORM: tl.constexpr, SILU: tl.constexpr,
    HAS_SKIP: tl.constexpr, HAS_SHORTCUT: tl.constexpr, HAS_SHORTCUT_SKIP: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_TIME: tl.constexpr, HAS_RESIDUAL: tl.constexpr, STATS: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """rows x columns: the positions of one phase. SIDE: of the taps, 2 for a phase. SPLIT: parts go to workspace."""
    PHASES: tl.constexpr = 4 if UPSAMPLE else 1
    col_tiles = tl.cdiv(cout, BLOCK_N)
    tiles = tl.cdiv(rows * columns, BLOCK_M)
    pid = tl.program_id(0)  # one axis for everything, because the others of a grid end at 65535
    col_tile, pid = pid % col_tiles, pid // col_tiles
    tile, pid = pid % tiles, pid // tiles
    phase, pid = pid % PHASES, pid // PHASES
    n, split = (pid % samples).to(tl.int64), pid // samples
    position = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    in_row = position < rows * columns
    row, column, place = placed(position, phase, rows, columns, UPSAMPLE)
    places = rows.to(tl.int64) * columns * PHASES
    cols = col_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    in_cols = cols < cout

    top, left = row * STRIDE - SIDE // 2, column * STRIDE - SIDE // 2
    if UPSAMPLE:  # a phase of parity p starts at i + p - 1
        top, left = row + phase // 2 - 1, column + phase % 2 - 1
        weight += phase.to(tl.int64) * cout * 4 * (c1 + c2)
    TAPS: tl.constexpr = SIDE * SIDE
    all_c = c1 + c2
    skip_begin = TAPS * tl.cdiv(c1, BLOCK_K)  # steps of the sum: x, skip, shortcut, shortcut_skip
    shortcut_begin = skip_begin + TAPS * tl.cdiv(c2, BLOCK_K)
    second_begin = shortcut_begin + tl.cdiv(cs1, BLOCK_K)
    steps = second_begin + tl.cdiv(cs2, BLOCK_K)
    pixels = height.to(tl.int64) * width
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # One loop for all sources, which scalars select: four loops would take the compiler four times as long and drain
    # the copies under way at each end. Taps run fastest, because their rows overlap.
    for step in range(split * split_steps, tl.minimum((split + 1) * split_steps, steps)):
        source, channels, before, local = x, c1, 0, step
        if HAS_SKIP:
            in_skip = step >= skip_begin
            source = tl.where(in_skip, skip, source)
            channels = tl.where(in_skip, c2, channels)
            before = tl.where(in_skip, c1, before)
            local = tl.where(in_skip, step - skip_begin, local)
        tap, chunk = local % TAPS, local // TAPS
        r, c = top + tap // SIDE, left + tap % SIDE
        pixel = r.to(tl.int64) * width + c
        kernel, kernel_row, kernel_at, image = weight, TAPS * all_c, tap * all_c + before, n * pixels
        if HAS_SHORTCUT:  # raw values at the places of the result
            flat = step >= shortcut_begin
            source = tl.where(flat, shortcut, source)
            channels = tl.where(flat, cs1, channels)
            chunk = tl.where(flat, step - shortcut_begin, chunk)
            r, c = tl.where(flat, 0, r), tl.where(flat, 0, c)  # inside whatever the size
            pixel = tl.where(flat, place, pixel)
            kernel = tl.where(flat, shortcut_weight, kernel)
            kernel_row = tl.where(flat, cs1 + cs2, kernel_row)
            kernel_at = tl.where(flat, 0, kernel_at)
            image = tl.where(flat, n * places, image)
            if HAS_SHORTCUT_SKIP:
                in_second = step >= second_begin
                source = tl.where(in_second, shortcut_skip, source)
                channels = tl.where(in_second, cs2, channels)
                chunk = tl.where(in_second, step - second_begin, chunk)
                kernel_at = tl.where(in_second, cs1, kernel_at)
        inside = in_row & (r >= 0) & (r < height) & (c >= 0) & (c < width)
        channel = chunk * BLOCK_K + tl.arange(0, BLOCK_K)
        in_channel = channel < channels
        mask = inside[:, None] & in_channel[None, :]
        a = tl.load(source + ((image + pixel) * channels)[:, None] + channel[None, :], mask=mask, other=0.0)
        b = tl.load(
            kernel + (cols.to(tl.int64) * kernel_row)[None, :] + (kernel_at + channel)[:, None],
            mask=in_channel[:, None] & in_cols[None, :],
            other=0.0,
        )
        if NORM:
            table = coefficients + n * 3 * all_c + before + channel
            in_table = in_channel
            if HAS_SHORTCUT:
                in_table = channel < tl.where(flat, 0, channels)
            centre = tl.load(table, mask=in_table, other=0.0)[None, :]
            gain = tl.load(table + all_c, mask=in_table, other=1.0)[None, :]  # 1: a shortcut's values stay as they are
            offset = tl.load(table + 2 * all_c, mask=in_table, other=0.0)[None, :]
            v = tl.where(mask, (a.to(tl.float32) - centre) * gain + offset, 0.0)  # padding is 0 after the prologue
            if SILU:
                active = v / (1.0 + tl.exp(-v))  # of 0 it is 0
                if HAS_SHORTCUT:
                    active = tl.where(flat, v, active)
                v = active
            a = v if WIDEN else v.to(a.dtype)
        if WIDEN:
            a, b = a.to(tl.float32), b.to(tl.float32)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    if SPLIT:
        at = ((split * samples + n) * places + place)[:, None] * cout + cols[None, :]
        tl.store(workspace + at, acc, mask=in_row[:, None] & in_cols[None, :])
    else:
        count = tl.minimum(rows * columns - tile * BLOCK_M, BLOCK_M)
        finish(
            acc, n, phase * tiles + tile, PHASES * tiles, count, place, places, in_row, cols, in_cols, cout,
            bias, time_shift, time_stride, residual, out, partials, counts, HAS_BIAS, HAS_TIME, HAS_RESIDUAL, STATS,
        )  # fmt: skip


@triton.jit(do_not_specialize=PLAIN)
def split_kernel(
    workspace, bias, time_shift, residual, out, partials, counts,
    samples, rows, columns, cout, time_stride, splits,
    UPSAMPLE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_TIME: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    STATS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Adds the parts of one tile in the order of the splits and finishes it."""
    PHASES: tl.constexpr = 4 if UPSAMPLE else 1
    col_tiles = tl.cdiv(cout, BLOCK_N)
    tiles = tl.cdiv(rows * columns, BLOCK_M)
    pid = tl.program_id(0)
    col_tile, pid = pid % col_tiles, pid // col_tiles
    tile, pid = pid % tiles, pid // tiles
    phase, n = pid % PHASES, (pid // PHASES).to(tl.int64)
    position = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    in_row = position < rows * columns
    _, _, place = placed(position, phase, rows, columns, UPSAMPLE)
    places = rows.to(tl.int64) * columns * PHASES
    cols = col_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    in_cols = cols < cout
    mask = in_row[:, None] & in_cols[None, :]
    at = (n * places + place)[:, None] * cout + cols[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for split in range(splits):
        acc += tl.load(workspace + split * (samples * places * cout) + at, mask=mask, other=0.0)
    count = tl.minimum(rows * columns - tile * BLOCK_M, BLOCK_M)
    finish(
        acc, n, phase * tiles + tile, PHASES * tiles, count, place, places, in_row, cols, in_cols, cout,
        bias, time_shift, time_stride, residual, out, partials, counts, HAS_BIAS, HAS_TIME, HAS_RESIDUAL, STATS,
    )  # fmt: skip


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
    config: Config | None = None,  # how to cut it; None: as ``tiles`` says
) -> Tensor | tuple[Tensor, ChannelStats]:
    n, cout, ho, wo = output_shape(x, weight, stride, upsample)
    phases, rows, columns = (4, x.shape[2], x.shape[3]) if upsample else (1, ho, wo)
    side = weight.shape[-1]
    c = channels_of(x, skip, shortcut, shortcut_skip)
    if config is None:
        config = choose(problem_of(x, weight, stride, upsample, c, coefficients is not None), x.device)
    chunks = [triton.cdiv(count, config.k) for count in c]
    steps = side * side * (chunks[0] + chunks[1]) + chunks[2] + chunks[3]
    split_steps = triton.cdiv(steps, config.splits)
    splits = triton.cdiv(steps, split_steps)
    tiles = triton.cdiv(rows * columns, config.m)
    pieces = phases * tiles
    partials, counts, workspace = x, x, x  # an unused pointer still needs a type
    if with_stats:
        partials, counts = stats_room("conv2d", out_stats, (n, cout, ho, wo), pieces, x)
    if splits > 1:
        workspace = torch.empty((splits, n, ho, wo, cout), dtype=torch.float32, device=x.device)

    if out is None:
        out = torch.empty((n, cout, ho, wo), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)

    def given(tensor: Tensor | None) -> Tensor:
        return x if tensor is None else tensor

    time_stride = 0 if time_shift is None else time_shift.stride(0)
    flags = {
        "UPSAMPLE": upsample, "HAS_BIAS": bias is not None, "HAS_TIME": time_shift is not None,
        "HAS_RESIDUAL": residual is not None, "STATS": with_stats,
    }  # fmt: skip
    conv_kernel[(triton.cdiv(cout, config.n) * pieces * n * splits,)](
        x, given(skip), weight, given(bias), given(coefficients), given(shortcut), given(shortcut_skip),
        given(shortcut_weight), given(time_shift), given(residual), out, partials, counts, workspace,
        n, x.shape[2], x.shape[3], rows, columns, *c, cout, time_stride, split_steps,
        SIDE=side, STRIDE=stride, NORM=coefficients is not None, SILU=silu, HAS_SKIP=skip is not None,
        HAS_SHORTCUT=shortcut is not None, HAS_SHORTCUT_SKIP=shortcut_skip is not None, SPLIT=splits > 1,
        BLOCK_M=config.m, BLOCK_N=config.n, BLOCK_K=config.k, PRECISION="ieee",
        WIDEN=not x.is_cuda,  # the interpreter would multiply the bit patterns of bfloat16
        num_warps=config.warps, num_stages=config.stages, **flags, **OPTIONS,
    )  # fmt: skip
    if splits > 1:
        narrow = min(config.n, 32)
        split_kernel[(triton.cdiv(cout, narrow) * pieces * n,)](
            workspace, given(bias), given(time_shift), given(residual), out, partials, counts,
            n, rows, columns, cout, time_stride, splits,
            BLOCK_M=config.m, BLOCK_N=narrow, num_warps=4, **flags, **OPTIONS,
        )  # fmt: skip
    return (out, ChannelStats(partials, counts)) if with_stats else out


def channels_of(*images: Tensor | None) -> list[int]:
    return [0 if image is None else image.shape[1] for image in images]


def problem_of(x: Tensor, weight: Tensor, stride: int, upsample: bool, c: list[int], norm: bool) -> Problem:
    n, cout, ho, wo = output_shape(x, weight, stride, upsample)
    phases = 4 if upsample else 1
    k = weight.shape[-1] * weight.shape[-2] * (c[0] + c[1]) + c[2] + c[3]
    return Problem(n, phases, ho * wo // phases, cout, k, x.element_size(), norm, not any(count % 16 for count in c))


def _pieces(x: Tensor, weight: Tensor, _: Any, stride: int, upsample: bool, *rest: Any) -> int:
    """Of the statistics of a call with these arguments."""
    skip, coefficients, _, shortcut, shortcut_skip, *_ = rest
    c = channels_of(x, skip, shortcut, shortcut_skip)
    problem = problem_of(x, weight, stride, upsample, c, coefficients is not None)
    return problem.phases * triton.cdiv(problem.positions, choose(problem, x.device).m)


conv2d.pieces = _pieces  # type: ignore[attr-defined]  # what conv2d_stats asks a backend for


def _variant(dtype: str, form: str, c: Config, split: bool = False, channels: str = "i32:16") -> Variant:
    full = form == "all"
    t = f"*{dtype}"
    flags = {"UPSAMPLE": form == "phases", "HAS_BIAS": True, "HAS_TIME": full, "HAS_RESIDUAL": full, "STATS": full}
    constants = {
        "SIDE": {"all": 3, "1x1": 1, "phases": 2}[form], "STRIDE": 1, "NORM": form != "phases", "SILU": full,
        "HAS_SKIP": full, "HAS_SHORTCUT": full, "HAS_SHORTCUT_SKIP": full, "SPLIT": split, "BLOCK_M": c.m,
        "BLOCK_N": c.n, "BLOCK_K": c.k, "PRECISION": "ieee", "WIDEN": False, **flags,
    }  # fmt: skip
    images = f"{t} {t} {t} {t} *fp32 {t} {t} {t} *fp32 {t} {t} *fp32 *fp32 *fp32 "
    types = images + "i32 " * 5 + f"{channels} " * 5 + "i32 i32"
    label = f"{dtype}, {form}, {c.m} x {c.n} x {c.k}, {c.warps} warps, {c.stages} stages{', split' if split else ''}"
    label += ", unaligned" if channels == "i32" else ""
    return Variant(conv_kernel, types, constants, {"num_warps": c.warps, "num_stages": c.stages, **OPTIONS}, label)


def _split_variant(dtype: str, c: Config) -> Variant:
    flags = dict.fromkeys(("UPSAMPLE", "HAS_BIAS", "HAS_TIME", "HAS_RESIDUAL", "STATS"), True)
    constants = {"BLOCK_M": c.m, "BLOCK_N": min(c.n, 32), **flags}
    types = f"*fp32 *{dtype} *fp32 *{dtype} *{dtype} *fp32 *fp32 i32 i32 i32 i32:16 i32 i32"
    label = f"{dtype}, {c.m} x {min(c.n, 32)}"
    return Variant(split_kernel, types, constants, {"num_warps": 4, **OPTIONS}, label)


AOT = [
    *(_variant("bf16", "all", config) for config in HALF),
    *(_variant("bf16", form, HALF[0]) for form in ("1x1", "phases")),
    *(_variant("bf16", "all", config, split=True) for config in (HALF[3], HALF[-1])),
    _variant("fp16", "all", HALF[0]),
    *(_variant("bf16", "all", config, channels="i32") for config in UNALIGNED),
    *(_variant("fp32", "all", config) for config in FLOAT),
    *(_split_variant("bf16", config) for config in {(c.m, min(c.n, 32)): c for c in HALF}.values()),
]
