"""CUDA kernel: csrc/attention/attention.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from idm_fast.kernels.extension import cuda_stream, optional_view, require_cuda, view

native = require_cuda()


def attention(
    q: Tensor,  # [N, L, heads, d]
    k: Tensor,  # [N, S, heads, d]
    v: Tensor,  # [N, S, heads, d]
    scale: float,
    out: Tensor | None,
) -> Tensor:
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    n, length, heads, d = q.shape
    splits = native.attention_cuda_splits(n, length, heads, d, k.shape[1])
    workspace = None
    if splits > 1:
        workspace = torch.empty((splits, n, length, heads, d + 2), dtype=torch.float32, device=q.device)
    native.attention_cuda(view(q), view(k), view(v), view(out), optional_view(workspace), scale, cuda_stream(q))
    return out
