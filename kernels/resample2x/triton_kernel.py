"""Triton kernel of resample2x: a program takes some channels of one output position. All offsets are int64."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from idm_fast.kernels.aot import Variant

BLOCK = 1024
INTERPRETED_BLOCK = 16384  # the interpreter runs a program at a time
OPTIONS = {"enable_fp_fusion": True}  # said aloud: the default changes in Triton 3.10, with a warning before


@triton.jit
def resample_kernel(x, out, elements, channels, width, UP: tl.constexpr, BLOCK: tl.constexpr):
    """``elements`` of out and its ``width``; rows are counted through all samples, which halves and doubles keep."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < elements
    position, channel = at // channels, at % channels
    row, col = position // width, position % width
    if UP:
        source = ((row // 2) * (width // 2) + col // 2) * channels + channel
        tl.store(out + at, tl.load(x + source, mask=mask), mask=mask)
    else:
        upper = ((2 * row) * (2 * width) + 2 * col) * channels + channel
        lower = upper + 2 * width * channels
        a = tl.load(x + upper, mask=mask).to(tl.float32)
        b = tl.load(x + upper + channels, mask=mask).to(tl.float32)
        c = tl.load(x + lower, mask=mask).to(tl.float32)
        d = tl.load(x + lower + channels, mask=mask).to(tl.float32)
        mean = (a * 0.25 + b * 0.25) + (c * 0.25 + d * 0.25)
        tl.store(out + at, mean.to(out.dtype.element_ty), mask=mask)


def resample2x(
    x: Tensor,  # [N, C, H, W] channels_last
    up: bool,
    out: Tensor,  # [N, C, 2H, 2W] or [N, C, H / 2, W / 2] channels_last
) -> None:
    block = BLOCK if x.is_cuda else INTERPRETED_BLOCK
    resample_kernel[(triton.cdiv(out.numel(), block),)](
        x, out, out.numel(), x.shape[1], out.shape[3], UP=up, BLOCK=block, **OPTIONS
    )


AOT = [
    Variant(resample_kernel, f"*{x} *{x} i32:16 i32:16 i32", {"UP": up, "BLOCK": BLOCK}, OPTIONS)
    for x in ("bf16", "fp16", "fp32")
    for up in (True, False)
]
