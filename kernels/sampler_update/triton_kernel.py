"""Triton kernel of sampler_update: conversion, clamp, update, noise and cast in one pass."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from idm_fast.kernels.aot import Variant
from idm_fast.kernels.philox_normal.triton_kernel import COUNTERS, INTERPRETED_COUNTERS, normals
from idm_fast.kernels.sampler_update.contract import position_stride


@triton.jit
def row_index(step, rows, ON_DEVICE: tl.constexpr):
    """``step`` itself, or what the counter on the device says, held inside the table."""
    if ON_DEVICE:
        at = tl.load(step)
        return tl.minimum(tl.maximum(at, 0), rows - 1)
    else:
        return step


@triton.jit
def unshuffled(n, element, elements, channels, width, pitch, UNSHUFFLE: tl.constexpr):
    """Where the elements of sample n lie in the network's own layout, whose positions are ``pitch`` elements apart."""
    position, channel = element // channels, element % channels
    h, w = position // width, position % width
    target = (h // UNSHUFFLE) * (width // UNSHUFFLE) + w // UNSHUFFLE  # position in the network's image
    target += n * (elements // channels // (UNSHUFFLE * UNSHUFFLE))
    lane = (channel * UNSHUFFLE + h % UNSHUFFLE) * UNSHUFFLE + w % UNSHUFFLE
    return target * pitch + lane


@triton.jit(do_not_specialize=["step", "rows"])  # else steps 1 and 16 would each compile a kernel of their own
def update_kernel(
    x, model_output, history, table, seeds, network_input, threshold, base, step, rows, elements,
    channels, width, input_channels,
    STEP_ON_DEVICE: tl.constexpr, HAS_INPUT: tl.constexpr, HAS_THRESHOLD: tl.constexpr,
    HAS_BASE: tl.constexpr, SHUFFLED: tl.constexpr,  # SHUFFLED: model_output is not laid out as x
    PLAIN: tl.constexpr,  # network_input is
    UNSHUFFLE: tl.constexpr,
    COUNTERS: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * COUNTERS
    element = first * 4 + tl.arange(0, 4 * COUNTERS)
    mask = element < elements
    at = n * elements + element
    index = row_index(step, rows, STEP_ON_DEVICE)
    row = table + index * 8
    k_x, k_out, a, b = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    c, s, limit = tl.load(row + 4), tl.load(row + 5), tl.load(row + 6)
    old = tl.load(x + at, mask=mask, other=0.0)
    if SHUFFLED:
        place = unshuffled(n, element, elements, channels, width, channels * UNSHUFFLE * UNSHUFFLE, UNSHUFFLE)
        output = tl.load(model_output + place, mask=mask, other=0.0).to(tl.float32)
    else:
        output = tl.load(model_output + at, mask=mask, other=0.0).to(tl.float32)
    if HAS_BASE:
        output += tl.load(base + at, mask=mask, other=0.0)
    x0 = k_x * old + k_out * output
    if HAS_THRESHOLD:
        limit = tl.load(threshold + n)
        x0 = tl.where(x0 > limit, limit, x0)
        x0 = tl.where(x0 < -limit, -limit, x0) / limit
    elif limit > 0:  # comparisons that a NaN fails, so that it stays one
        x0 = tl.where(x0 > limit, limit, x0)
        x0 = tl.where(x0 < -limit, -limit, x0)
    new = a * old + b * x0
    if c != 0:
        new += c * tl.load(history + at, mask=mask, other=0.0)
    if s != 0:
        new += s * normals(first, tl.load(seeds + n), index, COUNTERS)
    tl.store(x + at, new, mask=mask)
    tl.store(history + at, x0, mask=mask)
    if HAS_INPUT:
        if not PLAIN:
            at = unshuffled(n, element, elements, channels, width, input_channels, UNSHUFFLE)
        tl.store(network_input + at, new.to(network_input.dtype.element_ty), mask=mask)


def sampler_update(
    x: Tensor,  # [N, C, H, W] channels_last
    model_output: Tensor,  # [N, C, H, W] or [N, C f^2, H / f, W / f] channels_last
    history: Tensor,  # [N, C, H, W] channels_last
    table: Tensor,  # [T, 8]
    step: int | Tensor,
    seeds: Tensor,  # [N]
    network_input: Tensor | None = None,  # [N, C f^2, H / f, W / f] channels_last, or channels of such a tensor
    threshold: Tensor | None = None,  # [N]
    unshuffle: int = 1,
    base: Tensor | None = None,  # [N, C, H, W] channels_last
) -> None:
    n, c, _, w = x.shape
    elements = x.numel() // n
    counters = COUNTERS if x.is_cuda else INTERPRETED_COUNTERS
    pitch = c if network_input is None else position_stride(network_input)
    update_kernel[(triton.cdiv(elements, 4 * counters), n)](
        x,
        model_output,
        history,
        table,
        seeds,
        x if network_input is None else network_input,  # an unused pointer still needs a type
        x if threshold is None else threshold,
        x if base is None else base,
        step,
        table.shape[0],
        elements,
        c,
        w,
        pitch,
        STEP_ON_DEVICE=isinstance(step, Tensor),
        HAS_INPUT=network_input is not None,
        HAS_THRESHOLD=threshold is not None,
        HAS_BASE=base is not None,
        SHUFFLED=model_output.shape != x.shape,
        PLAIN=unshuffle == 1 and pitch == c,
        UNSHUFFLE=unshuffle,
        COUNTERS=counters,
        enable_fp_fusion=True,  # said aloud: the default changes in Triton 3.10, with a warning before
    )


AOT = [
    Variant(
        update_kernel,
        f"*fp32 *{x} *fp32 *fp32 *i64 *{x} *fp32 *fp32 {step} i32 i32:16 i32 i32:16 i32",
        {
            "STEP_ON_DEVICE": step == "*i64",
            "HAS_INPUT": True,
            "HAS_THRESHOLD": True,
            "HAS_BASE": True,
            "SHUFFLED": True,
            "PLAIN": False,
            "UNSHUFFLE": 2,
            "COUNTERS": COUNTERS,
        },
        {"enable_fp_fusion": True},
    )
    for x, step in (("bf16", "*i64"), ("fp16", "i32"), ("fp32", "i32"))
]
