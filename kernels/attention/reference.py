"""The judge: attention as the formula says, in float64 where the input is float64, else in float32."""

from __future__ import annotations

import torch
from torch import Tensor


def attention(
    q: Tensor,  # [N, L, heads, d]
    k: Tensor,  # [N, S, heads, d]
    v: Tensor,  # [N, S, heads, d]
    scale: float,
    out: Tensor | None,
) -> Tensor:
    work = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("nlhd,nshd->nhls", q.to(work), k.to(work)) * scale
    weights = torch.exp(scores - scores.amax(dim=-1, keepdim=True))
    weights = weights / weights.sum(dim=-1, keepdim=True)
    y = torch.einsum("nhls,nshd->nlhd", weights, v.to(work))
    return (torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out).copy_(y)
