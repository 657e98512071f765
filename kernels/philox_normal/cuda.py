"""CUDA kernel: csrc/sampler_update/sampler_update.cu, whose noise this is."""

from __future__ import annotations

import torch
from torch import Tensor

from idm_fast.kernels.extension import cuda_stream, require_cuda, view

native = require_cuda()


def philox_normal(
    seeds: Tensor,  # [N] int64
    shape: tuple[int, int, int, int],  # N, C, H, W
    step: int,
) -> Tensor:
    out = torch.empty(shape, dtype=torch.float32, device=seeds.device, memory_format=torch.channels_last)
    native.philox_normal_cuda(view(out), view(seeds), step, cuda_stream(out))
    return out
