"""CUDA kernel: csrc/attention/attention.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from idm_fast.kernels.extension import cuda_stream, require_cuda, view

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
    native.attention_cuda(view(q), view(k), view(v), view(out), scale, cuda_stream(q))
    return out
