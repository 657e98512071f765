"""CPU kernel: csrc/dynamic_threshold."""

from __future__ import annotations

import torch
from torch import Tensor

from idm_fast.kernels.extension import require_native, view

native = require_native()


def dynamic_threshold(
    x: Tensor,  # [N, C, H, W] channels_last
    model_output: Tensor,  # [N, C, H, W] channels_last
    table: Tensor,  # [T, 8]
    step: int | Tensor,
    quantile: float,
    out: Tensor,  # [N]
) -> Tensor:
    if isinstance(step, Tensor):
        step = min(max(int(step), 0), table.shape[0] - 1)
    native.dynamic_threshold(
        view(x), view(model_output), view(table), step, quantile, view(out), torch.get_num_threads()
    )
    return out
