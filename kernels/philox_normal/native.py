"""CPU kernel: csrc/sampler_update, whose noise this is."""

from __future__ import annotations

import torch
from torch import Tensor

from idm_fast.kernels.extension import require_native, view

native = require_native()


def philox_normal(
    seeds: Tensor,  # [N] int64
    shape: tuple[int, int, int, int],  # N, C, H, W
    step: int,
) -> Tensor:
    # The defaults that a user may have set (torch.set_default_dtype, set_default_device) must not come in here.
    out = torch.empty(shape, dtype=torch.float32, device=seeds.device, memory_format=torch.channels_last)
    native.philox_normal(view(out), view(seeds), step, torch.get_num_threads())
    return out
