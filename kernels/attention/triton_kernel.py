"""Triton attention: one program holds a tile of queries and walks the keys with an online softmax.

Source: Milakov & Gimelshein (arXiv 1805.02867) for the softmax, Dao (arXiv 2307.08691) for the loop order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def attention_kernel(
    q, k, v, out, length, keys, heads, d, scale_log2,
    q_n, q_l, q_h, k_n, k_l, k_h, v_n, v_l, v_h,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(length, QUERIES)  # one axis for everything, because the others of a grid end at 65535
    tile, image_head = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    n, head = (image_head // heads).to(tl.int64), (image_head % heads).to(tl.int64)
    row = tile.to(tl.int64) * QUERIES + tl.arange(0, QUERIES)
    lane = tl.arange(0, WIDTH)
    in_row, in_lane = (row < length)[:, None], (lane < d)[None, :]
    query = tl.load(q + n * q_n + head * q_h + row[:, None] * q_l + lane[None, :], mask=in_row & in_lane, other=0.0)
    if WIDEN:
        query = query.to(tl.float32)
    k += n * k_n + head * k_h
    v += n * v_n + head * v_h
    highest = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    sums = tl.zeros((QUERIES, WIDTH), tl.float32)
    for start in range(0, keys, KEYS):
        col = start + tl.arange(0, KEYS).to(tl.int64)
        in_col = col < keys
        key = tl.load(k + col[:, None] * k_l + lane[None, :], mask=in_col[:, None] & in_lane, other=0.0)
        if WIDEN:
            key = key.to(tl.float32)
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale_log2
        scores = tl.where(in_col[None, :], scores, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp2(scores - new_highest[:, None])
        keep = tl.exp2(highest - new_highest)
        total = total * keep + tl.sum(weights, 1)
        value = tl.load(v + col[:, None] * v_l + lane[None, :], mask=in_col[:, None] & in_lane, other=0.0)
        if WIDEN:
            value = value.to(tl.float32)
        sums = sums * keep[:, None] + tl.dot(weights.to(value.dtype), value, input_precision=PRECISION)
        highest = new_highest
    at = ((n * length + row[:, None]) * heads + head) * d + lane[None, :]
    tl.store(out + at, (sums / total[:, None]).to(out.dtype.element_ty), mask=in_row & in_lane)


def attention(
    q: Tensor,  # [N, L, heads, d]
    k: Tensor,  # [N, S, heads, d]
    v: Tensor,  # [N, S, heads, d]
    scale: float,
    out: Tensor | None,
) -> Tensor:
    n, length, heads, d = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    width = max(16, triton.next_power_of_2(d))
    tile = 64 if width <= 128 and q.dtype != torch.float32 else 32
    grid = (triton.cdiv(length, tile) * n * heads,)
    attention_kernel[grid](
        q, k, v, out, length, k.shape[1], heads, d, scale * 1.4426950408889634,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        QUERIES=tile, KEYS=tile, WIDTH=width, PRECISION="ieee",
        WIDEN=not q.is_cuda,  # the interpreter would multiply the bit patterns of bfloat16
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return out
