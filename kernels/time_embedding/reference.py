"""The judge of time_embedding: float64 where the weights are, else float32."""

from __future__ import annotations

import math

import torch
from torch import Tensor


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
    work = torch.promote_types(weight.dtype, torch.float32)

    def linear(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        y = x @ w.to(work).T
        return y if b is None else y + b.to(work)

    half = weight1.shape[1] // 2
    steps = torch.arange(half, dtype=work, device=t.device)
    angles = t.to(work)[:, None] * torch.exp(steps * (-math.log(10000.0) / half))
    halves = (angles.cos(), angles.sin()) if cos_first else (angles.sin(), angles.cos())
    hidden = linear(torch.cat(halves, dim=1), weight1, bias1)
    embedding = linear(hidden * torch.sigmoid(hidden), weight2, bias2)
    if label is not None:
        embedding = embedding + label.to(work)
    if embed_silu:
        embedding = embedding * torch.sigmoid(embedding)
    return out.copy_(linear(embedding, weight, bias))
