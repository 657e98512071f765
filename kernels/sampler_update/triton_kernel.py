"""Triton kernel of sampler_update: conversion, clamp, update, noise and cast in one pass.

The logarithm and the sine are polynomials of our own: the hardware's logarithm is off by 2e-7 absolutely, which near
u = 1 is an error of 7e-4 in the normal. The fits are those of csrc/common/vector_math.h.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

COUNTERS = 256  # Philox counters a program; four elements each
INTERPRETED_COUNTERS = 2048  # the interpreter's cost is by the program


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Philox 4x32-10 on uint32 tensors."""
    for _ in tl.static_range(10):
        p0_high, p0_low = tl.umulhi(c0, 0xD2511F53), c0 * 0xD2511F53
        p1_high, p1_low = tl.umulhi(c2, 0xCD9E8D57), c2 * 0xCD9E8D57
        c0, c1, c2, c3 = p1_high ^ c1 ^ k0, p1_low, p0_high ^ c3 ^ k1, p0_low
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def log_normal(u):
    """ln(u) for normal u > 0: u = 2^k (1 + t), ln(1 + t) = t - t^2/2 + t^3 q(t)."""
    pattern = u.to(tl.int32, bitcast=True)
    k = (pattern - 0x3F3504F3) >> 23
    t = (pattern - (k << 23)).to(tl.float32, bitcast=True) - 1.0
    q = 0.127989416 - t * 0.0830548986
    q = 0.141902317 + t * (-0.129434029 + t * q)
    q = 0.200018801 + t * (-0.166434891 + t * q)
    q = 0.333333265 + t * (-0.250002808 + t * q)
    return t + (t * t * (t * q - 0.5) + k.to(tl.float32) * 0.693147181)


@triton.jit
def box_muller(w0, w1):
    u1 = (w0 >> 8).to(tl.float32) * 5.9604644775390625e-08 + 2.98023223876953125e-08
    u2 = (w1 >> 8).to(tl.float32) * 5.9604644775390625e-08 + 2.98023223876953125e-08
    radius = tl.sqrt(log_normal(u1) * -2.0)
    quarter = tl.floor(u2 * 4.0 + 0.5)
    f = u2 - quarter * 0.25
    z = f * f
    sine = f * (6.28318529 + z * (-41.3416615 + z * (81.5923536 + z * -75.3935628)))
    cosine = 0.999999967 + z * (-19.7391466 + z * (64.9203064 + z * -83.552591))
    turn = quarter.to(tl.int32)
    odd = (turn & 1) != 0
    c = tl.where(odd, sine, cosine)
    s = tl.where(odd, cosine, sine)
    c = tl.where(((turn + 1) & 2) != 0, -c, c)
    s = tl.where((turn & 2) != 0, -s, s)
    return radius * c, radius * s


@triton.jit(do_not_specialize=["step"])  # else steps 1 and 16 would each compile a kernel of their own
def update_kernel(
    x, model_output, history, table, seeds, network_input, step, elements,
    HAS_INPUT: tl.constexpr, COUNTERS: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * COUNTERS
    element = first * 4 + tl.arange(0, 4 * COUNTERS)
    mask = element < elements
    at = n * elements + element
    row = table + step * 8
    k_x, k_out, a, b = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    c, s, limit = tl.load(row + 4), tl.load(row + 5), tl.load(row + 6)
    old = tl.load(x + at, mask=mask, other=0.0)
    x0 = k_x * old + k_out * tl.load(model_output + at, mask=mask, other=0.0).to(tl.float32)
    if limit > 0:  # comparisons that a NaN fails, so that it stays one
        x0 = tl.where(x0 > limit, limit, x0)
        x0 = tl.where(x0 < -limit, -limit, x0)
    new = a * old + b * x0
    if c != 0:
        new += c * tl.load(history + at, mask=mask, other=0.0)
    if s != 0:
        counter = first + tl.arange(0, COUNTERS)
        seed = tl.load(seeds + n)
        low, high = (counter & 0xFFFFFFFF).to(tl.uint32), (counter >> 32).to(tl.uint32)
        key0, key1 = (seed & 0xFFFFFFFF).to(tl.uint32), ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
        zero = tl.zeros((COUNTERS,), tl.uint32)
        w0, w1, w2, w3 = philox(low, high, zero + (step + 1).to(tl.uint32), zero, zero + key0, zero + key1)
        n0, n1 = box_muller(w0, w1)
        n2, n3 = box_muller(w2, w3)
        new += s * tl.interleave(tl.interleave(n0, n2), tl.interleave(n1, n3))
    tl.store(x + at, new, mask=mask)
    tl.store(history + at, x0, mask=mask)
    if HAS_INPUT:
        tl.store(network_input + at, new.to(network_input.dtype.element_ty), mask=mask)


def sampler_update(
    x: Tensor,  # [N, C, H, W] channels_last
    model_output: Tensor,  # [N, C, H, W] channels_last
    history: Tensor,  # [N, C, H, W] channels_last
    table: Tensor,  # [T, 8]
    step: int,
    seeds: Tensor,  # [N]
    network_input: Tensor | None,  # [N, C, H, W] channels_last
) -> None:
    n = x.shape[0]
    elements = x.numel() // n
    counters = COUNTERS if x.is_cuda else INTERPRETED_COUNTERS
    update_kernel[(triton.cdiv(elements, 4 * counters), n)](
        x,
        model_output,
        history,
        table,
        seeds,
        x if network_input is None else network_input,
        step,
        elements,
        HAS_INPUT=network_input is not None,
        COUNTERS=counters,
        enable_fp_fusion=True,  # said aloud: the default changes in Triton 3.10, with a warning before
    )
