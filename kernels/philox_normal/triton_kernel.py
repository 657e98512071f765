"""Triton code of the noise: Philox 4x32-10, Box-Muller, and a kernel that writes nothing else.

The logarithm and the sine are polynomials of our own: the hardware's logarithm is off by 2e-7 absolutely, which near
u = 1 is an error of 7e-4 in the normal. The fits are those of csrc/common/vector_math.h.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from idm_fast.kernels.aot import Variant

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


@triton.jit
def normals(first, seed, step, COUNTERS: tl.constexpr):
    """The 4 * COUNTERS normals of the counters from ``first`` on, in element order; seed int64, step an integer."""
    counter = first + tl.arange(0, COUNTERS)
    low, high = (counter & 0xFFFFFFFF).to(tl.uint32), (counter >> 32).to(tl.uint32)
    key0, key1 = (seed & 0xFFFFFFFF).to(tl.uint32), ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    zero = tl.zeros((COUNTERS,), tl.uint32)
    w0, w1, w2, w3 = philox(low, high, zero + (step + 1).to(tl.uint32), zero, zero + key0, zero + key1)
    n0, n1 = box_muller(w0, w1)
    n2, n3 = box_muller(w2, w3)
    return tl.interleave(tl.interleave(n0, n2), tl.interleave(n1, n3))


@triton.jit(do_not_specialize=["step"])
def normal_kernel(out, seeds, step, elements, COUNTERS: tl.constexpr):
    n = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * COUNTERS
    element = first * 4 + tl.arange(0, 4 * COUNTERS)
    noise = normals(first, tl.load(seeds + n), step, COUNTERS)
    tl.store(out + n * elements + element, noise, mask=element < elements)


def philox_normal(
    seeds: Tensor,  # [N] int64
    shape: tuple[int, int, int, int],  # N, C, H, W
    step: int,
) -> Tensor:
    out = torch.empty(shape, dtype=torch.float32, device=seeds.device, memory_format=torch.channels_last)
    elements = out.numel() // shape[0]
    counters = COUNTERS if seeds.is_cuda else INTERPRETED_COUNTERS
    grid = (triton.cdiv(elements, 4 * counters), shape[0])
    # said aloud: the default of the fusion changes in Triton 3.10, with a warning before
    normal_kernel[grid](out, seeds, step, elements, COUNTERS=counters, enable_fp_fusion=True)
    return out


AOT = [Variant(normal_kernel, "*fp32 *i64 i32 i32:16", {"COUNTERS": COUNTERS}, {"enable_fp_fusion": True})]
