"""CPU kernel: csrc/attention."""

from __future__ import annotations

import torch
from torch import Tensor

from idm_fast.kernels.extension import require_native, view

native = require_native()


def attention(
    q: Tensor,  # [N, L, heads, d]
    k: Tensor,  # [N, S, heads, d]
    v: Tensor,  # [N, S, heads, d]
    scale: float,
    out: Tensor | None,
) -> Tensor:
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype)
    native.attention(view(q), view(k), view(v), view(out), scale, torch.get_num_threads())
    return out
