"""CPU kernel: csrc/attention."""

from __future__ import annotations

import torch
from torch import Tensor

from idm_fast.kernels.extension import Prepared, binder, require_native, view

native = require_native()


def prepare(
    q: Tensor,  # [N, L, heads, d]
    k: Tensor,  # [N, S, heads, d]
    v: Tensor,  # [N, S, heads, d]
    scale: float,
    out: Tensor | None,
) -> Prepared:
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    return Prepared((view(q), view(k), view(v), view(out), scale, torch.get_num_threads()), out)


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, out: Tensor | None) -> Tensor:
    call = prepare(q, k, v, scale, out)
    native.attention(*call.arguments)
    result: Tensor = call.result
    return result


attention.bind = binder(native.attention, prepare)  # type: ignore[attr-defined]  # what dispatch.bound asks for
