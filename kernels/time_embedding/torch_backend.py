"""time_embedding in torch operators, float32."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
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
    angles = t[:, None] * frequencies(weight1.shape[1] // 2, t.device)
    halves = (angles.cos(), angles.sin()) if cos_first else (angles.sin(), angles.cos())
    hidden = _linear32(torch.cat(halves, dim=1), weight1, bias1)
    embedding = _linear32(F.silu(hidden), weight2, bias2)
    if label is not None:
        embedding = embedding + label
    if embed_silu:
        embedding = F.silu(embedding)
    if out.dtype == torch.float32 and bias is not None:
        return torch.addmm(bias.float(), embedding, weight.float().T, out=out)
    return out.copy_(_linear32(embedding, weight, bias))


def frequencies(half: int, device: torch.device) -> Tensor:
    """10000^(-i / half), i < half, in float32 as models/blocks.py has them: t times an ulp of one is no small angle."""
    return torch.exp(torch.arange(half, dtype=torch.float32, device=device) * (-math.log(10000.0) / half))


def _linear32(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight.float(), None if bias is None else bias.float())
