"""Triton codebook lookup: one program holds a tile of positions and walks the codes."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from idm_fast.kernels.aot import Variant

OPTIONS = {"enable_fp_fusion": True}  # said aloud: the default changes in Triton 3.10, with a warning before
# (positions, codes, channels at a time, warps): narrow codes are multiplied channel by channel, wide ones by tl.dot.
# Sizes are such that nothing spills, also where all channels of the positions are kept in registers (d < 8).
NARROW = (32, 64, 1, 8)
WIDE = (32, 64, 16, 4)
NARROW_WIDTH = 8


@triton.jit(do_not_specialize=["count", "size"])
def vq_nearest_kernel(
    z, codebook, codes, quantised, count, size,
    d: tl.constexpr, POSITIONS: tl.constexpr, CODES: tl.constexpr, STEP: tl.constexpr, COPY: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * POSITIONS + tl.arange(0, POSITIONS)
    in_row = row < count
    z += row * d
    near = tl.arange(0, CODES)
    best = tl.full((POSITIONS,), float("inf"), tl.float32)
    chosen = tl.zeros((POSITIONS,), tl.int32)
    tile = codebook  # moves on, so that offsets inside a tile fit 32 bits
    for start in range(0, size, CODES):
        book = tile + near * d
        in_book = near < size - start
        products = tl.zeros((POSITIONS, CODES), tl.float32)
        squares = tl.zeros((CODES,), tl.float32)
        if STEP == 1:
            for channel in tl.static_range(d):
                left = tl.load(z + channel, mask=in_row, other=0.0).to(tl.float32)
                right = tl.load(book + channel, mask=in_book, other=0.0).to(tl.float32)
                products += left[:, None] * right[None, :]
                squares += right * right
        else:
            for first in range(0, d, STEP):
                lane = first + tl.arange(0, STEP)
                left = tl.load(z[:, None] + lane[None, :], mask=in_row[:, None] & (lane < d)[None, :], other=0.0)
                right = tl.load(book[None, :] + lane[:, None], mask=in_book[None, :] & (lane < d)[:, None], other=0.0)
                left, right = left.to(tl.float32), right.to(tl.float32)
                products = tl.dot(left, right, products, input_precision="ieee")
                squares += tl.sum(right * right, 0)
        distance = squares[None, :] - 2.0 * products
        # What is no number compares false and goes the way of the codes that do not exist.
        distance = tl.where(in_book[None, :] & (distance == distance), distance, float("inf"))
        least = tl.min(distance, 1)
        first_code = tl.min(tl.where(distance == least[:, None], near[None, :], CODES), 1)
        better = least < best
        chosen = tl.where(better, start + first_code, chosen)
        best = tl.where(better, least, best)
        tile += CODES * d
    tl.store(codes + row, chosen.to(tl.int64), mask=in_row)
    for first in range(0, d, COPY):
        lane = first + tl.arange(0, COPY)
        mask = in_row[:, None] & (lane < d)[None, :]
        value = tl.load(codebook + chosen.to(tl.int64)[:, None] * d + lane[None, :], mask=mask, other=0.0)
        at = quantised + row[:, None] * d + lane[None, :]
        tl.store(at, value.to(tl.float32).to(quantised.dtype.element_ty), mask=mask)


def _copied(d: int) -> int:
    """Channels of the chosen rows that are copied at a time."""
    return min(32, triton.next_power_of_2(d))


def vq_nearest(z: Tensor, codebook: Tensor, codes: Tensor, quantised: Tensor) -> None:
    d, count = z.shape[1], codes.numel()
    positions, width, step, warps = NARROW if d < NARROW_WIDTH else WIDE
    vq_nearest_kernel[(triton.cdiv(count, positions),)](
        z, codebook, codes, quantised, count, codebook.shape[0], d=d, POSITIONS=positions, CODES=width, STEP=step,
        COPY=_copied(d), num_warps=warps, **OPTIONS,
    )  # fmt: skip


def _variant(dtype: str, d: int, shape: tuple[int, int, int, int]) -> Variant:
    positions, codes, step, warps = shape
    constants = {"d": d, "POSITIONS": positions, "CODES": codes, "STEP": step, "COPY": _copied(d)}
    return Variant(
        vq_nearest_kernel,
        f"*{dtype} *fp32 *i64 *{dtype} i32 i32",
        constants,
        {"num_warps": warps, **OPTIONS},
    )


AOT = [
    *(_variant(dtype, 4, NARROW) for dtype in ("bf16", "fp32")),
    _variant("bf16", NARROW_WIDTH - 1, NARROW),
    *(_variant(dtype, 64, WIDE) for dtype in ("bf16", "fp32")),
    *(_variant("bf16", d, WIDE) for d in (8, 33)),
]
