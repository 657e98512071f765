"""Triton attention: one program holds a tile of queries and walks the keys with an online softmax.

Source: Milakov & Gimelshein (arXiv 1805.02867) for the softmax, Dao (arXiv 2307.08691) for the loop order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from idm_fast.kernels.aot import Variant


@dataclass(frozen=True)
class Tiling:
    """How the work is cut; every one gives a right result, which is fastest depends on shape and device."""

    queries: int
    keys: int
    step: int  # channels of q and k multiplied at a time; the head's width or more: the queries stay on the chip
    values: int  # channels of v in one program; fewer make more programs, each with all the scores
    warps: int
    stages: int

    def fits(self, width: int) -> bool:
        """Whether this tiling may be used for heads of ``width`` (a power of two) channels."""
        return self.values <= width and (self.step <= width)


# For 16-bit types, by the head's width rounded up to a power of two; the first is the choice where blocks abound.
TILINGS = {
    16: (Tiling(64, 64, 16, 16, 4, 2),),
    32: (Tiling(128, 64, 32, 32, 4, 3), Tiling(64, 64, 32, 32, 4, 3), Tiling(16, 64, 32, 32, 2, 3)),
    64: (Tiling(128, 64, 64, 64, 8, 3), Tiling(64, 64, 64, 64, 4, 3), Tiling(16, 64, 64, 64, 2, 3)),
    128: (Tiling(128, 64, 128, 128, 8, 2), Tiling(64, 32, 128, 128, 4, 2), Tiling(16, 64, 128, 64, 2, 2)),
    256: (Tiling(64, 32, 256, 256, 8, 2), Tiling(32, 32, 256, 128, 4, 2), Tiling(16, 64, 256, 64, 4, 2)),
    512: (Tiling(64, 32, 128, 256, 8, 2), Tiling(32, 64, 128, 256, 8, 2), Tiling(16, 64, 128, 128, 4, 2)),
}
FLOAT32_TILINGS = (Tiling(32, 32, 64, 64, 8, 1), Tiling(16, 32, 32, 32, 4, 1))  # no matrix units: small tiles
MAX_WIDTH = max(TILINGS)


@triton.jit
def attention_kernel(
    q, k, v, out, length, keys, heads, scale_log2,
    q_n, q_l, q_h, k_n, k_l, k_h, v_n, v_l, v_h,
    d: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr, STEP: tl.constexpr,
    VALUES: tl.constexpr, NEGATIVE: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    # One axis for everything, because the others of a grid end at 65535. Programs that share queries are neighbours.
    chunks: tl.constexpr = (d + VALUES - 1) // VALUES
    tiles = tl.cdiv(length, QUERIES)
    chunk, task = tl.program_id(0) % chunks, tl.program_id(0) // chunks
    tile, image_head = task % tiles, task // tiles
    n, head = (image_head // heads).to(tl.int64), (image_head % heads).to(tl.int64)
    row = tile.to(tl.int64) * QUERIES + tl.arange(0, QUERIES)
    step_lane, lane = tl.arange(0, STEP), chunk * VALUES + tl.arange(0, VALUES)
    in_row, in_lane = (row < length)[:, None], (lane < d)[None, :]
    q += n * q_n + head * q_h + row[:, None] * q_l
    k += n * k_n + head * k_h
    v += n * v_n + head * v_h
    near = tl.arange(0, KEYS)  # offsets inside a tile fit 32 bits; the pointers to the tile are what moves
    key_at, value_at = near[None, :] * k_l + step_lane[:, None], near[:, None] * v_l + lane[None, :]
    if STEP == WIDTH:
        query = tl.load(q + step_lane[None, :], mask=in_row & (step_lane < d)[None, :], other=0.0)
        if WIDEN:
            query = query.to(tl.float32)
    highest = tl.full((QUERIES,), -3.0e38, tl.float32)  # not infinity, which times a scale of zero is no number
    total = tl.zeros((QUERIES,), tl.float32)
    sums = tl.zeros((QUERIES, VALUES), tl.float32)
    for start in range(0, keys, KEYS):
        in_col = near < keys - start
        scores = tl.zeros((QUERIES, KEYS), tl.float32)
        for first in tl.static_range(0, d, STEP):
            in_part = first + step_lane < d
            if STEP != WIDTH:
                query = tl.load(q + (first + step_lane)[None, :], mask=in_row & in_part[None, :], other=0.0)
                if WIDEN:
                    query = query.to(tl.float32)
            key = tl.load(k + first + key_at, mask=in_col[None, :] & in_part[:, None], other=0.0)
            if WIDEN:
                key = key.to(tl.float32)
            scores = tl.dot(query, key, scores, input_precision=PRECISION)
        if NEGATIVE:
            scores = -scores
        scores = tl.where(in_col[None, :], scores, -3.0e38)
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        # Subtract, then scale: the difference of near scores is exact, however large they are.
        weights = tl.exp2((scores - new_highest[:, None]) * scale_log2)
        weights = tl.where(in_col[None, :], weights, 0.0)
        keep = tl.exp2((highest - new_highest) * scale_log2)
        total = total * keep + tl.sum(weights, 1)
        value = tl.load(v + value_at, mask=in_col[:, None] & in_lane, other=0.0)
        if WIDEN:
            value = value.to(tl.float32)
        sums = tl.dot(weights.to(value.dtype), value, sums * keep[:, None], input_precision=PRECISION)
        highest = new_highest
        k += KEYS * k_l
        v += KEYS * v_l
    at = ((n * length + row[:, None]) * heads + head) * d + lane[None, :]
    tl.store(out + at, (sums / total[:, None]).to(out.dtype.element_ty), mask=in_row & in_lane)


def tilings(dtype: torch.dtype, d: int) -> tuple[Tiling, ...]:
    """The declared tilings for heads of ``d`` channels, those with the largest tiles first."""
    width = max(16, triton.next_power_of_2(d))
    if dtype != torch.float32:
        return TILINGS[width]
    # Steps and values as wide as the head where that is narrower.
    return tuple(
        Tiling(t.queries, t.keys, min(t.step, width), min(t.values, width), t.warps, t.stages) for t in FLOAT32_TILINGS
    )


def choose(dtype: torch.dtype, blocks_of: int, length: int, d: int, processors: int) -> Tiling:
    """The first tiling that gives each of ``processors`` a program, or the last. ``blocks_of`` is samples x heads."""
    declared = tilings(dtype, d)
    for tiling in declared:
        if blocks_of * triton.cdiv(length, tiling.queries) * triton.cdiv(d, tiling.values) >= processors:
            return tiling
    return declared[-1]


def attention(
    q: Tensor,  # [N, L, heads, d]
    k: Tensor,  # [N, S, heads, d]
    v: Tensor,  # [N, S, heads, d]
    scale: float,
    out: Tensor | None,
    tiling: Tiling | None = None,
) -> Tensor:
    n, length, heads, d = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    if tiling is None:
        processors = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 1
        tiling = choose(q.dtype, n * heads, length, d, processors)
    grid = (triton.cdiv(d, tiling.values) * triton.cdiv(length, tiling.queries) * n * heads,)
    attention_kernel[grid](
        q, k, v, out, length, k.shape[1], heads, abs(scale) * 1.4426950408889634,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        d=d, QUERIES=tiling.queries, KEYS=tiling.keys, WIDTH=max(16, triton.next_power_of_2(d)), STEP=tiling.step,
        VALUES=tiling.values, NEGATIVE=scale < 0, PRECISION="ieee",
        WIDEN=not q.is_cuda,  # the interpreter would multiply the bit patterns of bfloat16
        num_warps=tiling.warps, num_stages=tiling.stages, enable_fp_fusion=True,
    )  # fmt: skip
    return out


def _variant(dtype: str, width: int, t: Tiling) -> Variant:
    constants = {
        "d": width, "QUERIES": t.queries, "KEYS": t.keys, "WIDTH": width, "STEP": t.step, "VALUES": t.values,
        "NEGATIVE": False, "PRECISION": "ieee", "WIDEN": False,
    }  # fmt: skip
    types = f"*{dtype} *{dtype} *{dtype} *{dtype} i32 i32 i32 fp32 " + " ".join(["i32:16"] * 9)
    options = {"num_warps": t.warps, "num_stages": t.stages, "enable_fp_fusion": True}
    label = f"{dtype}, width {width}, {t.queries} x {t.keys}, step {t.step}, values {t.values}"
    return Variant(attention_kernel, types, constants, options, f"{label}, {t.warps} warps, {t.stages} stages")


AOT = [
    *(_variant("bf16", width, t) for width, tilings_ in TILINGS.items() for t in tilings_),
    *(_variant("fp16", width, TILINGS[width][0]) for width in TILINGS),
    *(_variant("fp32", width, t) for width in (32, 128, 512) for t in tilings(torch.float32, width)),
]
