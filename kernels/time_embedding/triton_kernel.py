"""Triton kernel of time_embedding: one kernel, launched for each of the three products.

Activations and nonlinearities are made where they are read, so that nothing but the two embeddings [T, hidden] and
[T, width] passes through memory. Products are float32 ones (no TF32): T is small and this runs once a walk.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from idm_fast.kernels.aot import Variant
from idm_fast.kernels.time_embedding.torch_backend import frequencies

ROWS, COLS, DEPTH = 16, 64, 32  # of a tile


@triton.jit
def linear_kernel(
    x, frequency, weight, bias, added, out, rows, cols, depth, added_stride,
    SINUSOID: tl.constexpr, COS_FIRST: tl.constexpr, SILU: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_ADDED: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """out [rows, cols] = f(x) @ weight [cols, depth]^T + bias + added; x [rows, depth], or the times [rows]."""
    row = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(0).to(tl.int64) * COLS + tl.arange(0, COLS)
    in_rows, in_cols = row < rows, col < cols
    sums = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(0, depth, DEPTH):
        k = start + tl.arange(0, DEPTH)
        in_depth = k < depth
        if SINUSOID:
            half = depth // 2
            first = k < half
            angle = tl.load(x + row, mask=in_rows, other=0.0)[:, None]
            angle = angle * tl.load(frequency + tl.where(first, k, k - half), mask=in_depth, other=0.0)[None, :]
            of_first, of_second = (tl.cos(angle), tl.sin(angle)) if COS_FIRST else (tl.sin(angle), tl.cos(angle))
            a = tl.where(in_depth[None, :], tl.where(first[None, :], of_first, of_second), 0.0)
        else:
            a = tl.load(x + row[:, None] * depth + k[None, :], mask=in_rows[:, None] & in_depth[None, :], other=0.0)
            if SILU:
                a = a / (1.0 + tl.exp(-a))
        w = tl.load(weight + col[:, None] * depth + k[None, :], mask=in_cols[:, None] & in_depth[None, :], other=0.0)
        sums = tl.dot(a, tl.trans(w.to(tl.float32)), sums, input_precision="ieee")
    if HAS_BIAS:
        sums += tl.load(bias + col, mask=in_cols, other=0.0).to(tl.float32)[None, :]
    mask = in_rows[:, None] & in_cols[None, :]
    if HAS_ADDED:
        at = row[:, None] * added_stride + col[None, :]
        sums += tl.load(added + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row[:, None] * cols + col[None, :], sums.to(out.dtype.element_ty), mask=mask)


def _linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    *,
    frequency: Tensor | None = None,
    cos_first: bool = False,
    silu: bool = False,
    added: Tensor | None = None,
) -> None:
    rows, (cols, depth) = x.shape[0], weight.shape
    linear_kernel[(triton.cdiv(cols, COLS), triton.cdiv(rows, ROWS))](
        x,
        x if frequency is None else frequency,  # an unused pointer still needs a type
        weight,
        weight if bias is None else bias,
        weight if added is None else added,
        out,
        rows,
        cols,
        depth,
        0 if added is None or added.shape[0] == 1 else added.stride(0),
        SINUSOID=frequency is not None,
        COS_FIRST=cos_first,
        SILU=silu,
        HAS_BIAS=bias is not None,
        HAS_ADDED=added is not None,
        ROWS=ROWS,
        COLS=COLS,
        DEPTH=DEPTH,
        enable_fp_fusion=True,  # said aloud: the default changes in Triton 3.10, with a warning before
    )


def time_embedding(
    t: Tensor,  # [T]
    weight1: Tensor,  # [hidden, features]
    bias1: Tensor | None,
    weight2: Tensor,  # [width, hidden]
    bias2: Tensor | None,
    weight: Tensor,  # [S, width]
    bias: Tensor | None,
    cos_first: bool,
    label: Tensor | None,  # [T or 1, width]
    embed_silu: bool,
    out: Tensor,  # [T, S]
) -> Tensor:
    t = t.contiguous()
    hidden = torch.empty(len(t), len(weight1), dtype=torch.float32, device=t.device)
    embedding = torch.empty(len(t), len(weight2), dtype=torch.float32, device=t.device)
    table = frequencies(weight1.shape[1] // 2, t.device)
    _linear(t, weight1, bias1, hidden, frequency=table, cos_first=cos_first)
    _linear(hidden, weight2, bias2, embedding, silu=True, added=label)
    _linear(embedding, weight, bias, out, silu=embed_silu)
    return out


def _variant(x: str, weight: str, out: str, sinusoid: bool) -> Variant:
    flags = {
        "SINUSOID": sinusoid,
        "COS_FIRST": False,
        "SILU": not sinusoid,
        "HAS_BIAS": True,
        "HAS_ADDED": not sinusoid,
    }
    return Variant(
        linear_kernel,
        f"*{x} *fp32 *{weight} *{weight} *{weight} *{out} i32 i32:16 i32:16 i32:16",
        {**flags, "ROWS": ROWS, "COLS": COLS, "DEPTH": DEPTH},
        {"enable_fp_fusion": True},
        f"{x} x {weight} -> {out}{', sinusoid' if sinusoid else ''}",
    )


AOT = [
    variant
    for weight in ("bf16", "fp16", "fp32")
    for variant in (_variant("fp32", weight, "fp32", True), _variant("fp32", weight, weight, False))
]
