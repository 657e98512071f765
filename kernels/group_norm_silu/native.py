"""CPU kernel: csrc/group_norm_silu."""

from __future__ import annotations

import torch
from torch import Tensor

from idm_fast.kernels.extension import optional_view, require_native, view

native = require_native()


def group_norm_silu(
    x: Tensor,  # [N, C, H, W] channels_last
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
    out: Tensor | None,
) -> Tensor:
    if out is None:
        out = torch.empty_like(x)
    native.group_norm_silu(
        view(x),
        view(out),
        optional_view(weight),
        optional_view(bias),
        optional_view(scale),
        optional_view(shift),
        num_groups,
        eps,
        silu,
        torch.get_num_threads(),
    )
    return out
