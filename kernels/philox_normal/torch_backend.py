"""The noise of reference.py with the elementary functions in float32."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from idm_fast.kernels.philox_normal.reference import in_image_order, uniforms


def philox_normal(
    seeds: Tensor,  # [N] int64
    shape: tuple[int, ...],  # N, C, H, W
    step: int | Tensor,
) -> Tensor:
    u = uniforms(seeds, math.prod(shape[1:]), step)
    normals = []
    for u1, u2 in ((u[0], u[1]), (u[2], u[3])):
        radius = torch.sqrt(-2.0 * torch.log(u1))
        angle = 2.0 * math.pi * u2
        normals += [radius * torch.cos(angle), radius * torch.sin(angle)]
    return in_image_order(normals, shape).contiguous(memory_format=torch.channels_last)
