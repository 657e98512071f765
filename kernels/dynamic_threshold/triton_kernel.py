"""Triton kernel of dynamic_threshold: radix select on the bits of |x0_hat|, which order as the values do.

One program a sample; eight bits of the wanted order statistic a pass, by a histogram of those that agree so far. Counts
are whole numbers, so the order in which they are added does not matter. x0_hat is made anew in every pass: it lies in
the L2 cache, a buffer for it would too.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from idm_fast.kernels.aot import Variant
from idm_fast.kernels.sampler_update.triton_kernel import row_index

BLOCK = 4096
BINS = tl.constexpr(256)


@triton.jit
def magnitudes(x, model_output, at, mask, k_x, k_out):
    """The bits of |x0_hat| as int32; beyond the end -1."""
    x0 = k_x * tl.load(x + at, mask=mask, other=0.0)
    x0 += k_out * tl.load(model_output + at, mask=mask, other=0.0).to(tl.float32)
    return tl.where(mask, x0.to(tl.int32, bitcast=True) & 0x7FFFFFFF, -1)


@triton.jit(do_not_specialize=["step", "rows", "low"])
def threshold_kernel(
    x, model_output, table, out, step, rows, elements, low, weight,
    STEP_ON_DEVICE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    x += n * elements
    model_output += n * elements
    row = table + row_index(step, rows, STEP_ON_DEVICE) * 8
    k_x, k_out = tl.load(row), tl.load(row + 1)
    lane = tl.arange(0, BLOCK)
    bins = tl.arange(0, BINS)
    prefix = tl.zeros((), tl.int32)  # the bits found so far
    left = low.to(tl.int64)  # how many of those that agree lie below
    for digit in tl.static_range(4):
        counts = tl.zeros((BINS,), tl.int64)
        for start in range(0, elements, BLOCK):
            at = start + lane
            u = magnitudes(x, model_output, at, at < elements, k_x, k_out)
            agree = u >= 0
            if digit > 0:
                agree = agree & ((u >> (32 - 8 * digit)) == prefix)
            counts += tl.histogram((u >> (24 - 8 * digit)) & 0xFF, BINS, mask=agree).to(tl.int64)
        up_to = tl.cumsum(counts, 0)
        found = tl.sum((up_to <= left).to(tl.int32), 0)  # the first bin whose end lies above
        left -= tl.sum(tl.where(bins < found, counts, 0), 0)
        prefix = (prefix << 8) | found
    # The next order statistic: the same value again, or the smallest one above it.
    same = tl.zeros((BLOCK,), tl.int64)
    above = tl.full((BLOCK,), 0x7FFFFFFF, tl.int32)
    largest = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, elements, BLOCK):
        at = start + lane
        u = magnitudes(x, model_output, at, at < elements, k_x, k_out)
        same += ((u >= 0) & (u <= prefix)).to(tl.int64)
        above = tl.where((u > prefix) & (u < above), u, above)
        largest = tl.maximum(largest, u)
    a = prefix.to(tl.float32, bitcast=True)
    b = tl.where(tl.sum(same, 0) > low + 1, prefix, tl.min(above, 0)).to(tl.float32, bitcast=True)
    b = tl.where(weight == 0.0, a, b)
    span = tl.where(a == b, 0.0, b) - tl.where(a == b, 0.0, a)  # also where both are infinite
    value = tl.where(weight < 0.5, a + weight * span, b - span * (1.0 - weight))
    value = tl.where(value < 1.0, 1.0, value)
    value = tl.where(tl.max(largest, 0) > 0x7F800000, float("nan"), value)
    tl.store(out + n, value)


def dynamic_threshold(
    x: Tensor,  # [N, C, H, W] channels_last
    model_output: Tensor,  # [N, C, H, W] channels_last
    table: Tensor,  # [T, 8]
    step: int | Tensor,
    quantile: float,
    out: Tensor,  # [N]
) -> Tensor:
    n = x.shape[0]
    elements = x.numel() // n
    low = math.floor(quantile * (elements - 1))
    threshold_kernel[(n,)](
        x,
        model_output,
        table,
        out,
        step,
        table.shape[0],
        elements,
        low,
        quantile * (elements - 1) - low,
        STEP_ON_DEVICE=isinstance(step, Tensor),
        BLOCK=BLOCK,
        num_warps=16,
        enable_fp_fusion=True,
    )
    return out


AOT = [
    Variant(
        threshold_kernel,
        f"*fp32 *{x} *fp32 *fp32 {step} i32 i32:16 i32 fp32",
        {"STEP_ON_DEVICE": step == "*i64", "BLOCK": BLOCK},
        {"num_warps": 16, "enable_fp_fusion": True},
    )
    for x, step in (("bf16", "*i64"), ("fp16", "i32"), ("fp32", "i32"))
]
