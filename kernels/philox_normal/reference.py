"""The definition of the noise, in pure torch: the judge of philox_normal.

Philox 4x32-10: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011. Words become uniforms
u = (word >> 8) * 2^-24 + 2^-25 in float32, in (0, 1]; pairs of them normals by Box & Muller (1958). What follows the
uniforms is computed in float64 here, so that this is what the fast versions are measured against.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MASK = 0xFFFFFFFF


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Ten rounds on 32-bit words held in int64 tensors; products wrap as unsigned 64-bit ones do."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((p1 >> 32) & MASK) ^ c1 ^ k0, p1 & MASK, ((p0 >> 32) & MASK) ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return [c0, c1, c2, c3]


def uniforms(seeds: Tensor, elements: int, step: int | Tensor) -> list[Tensor]:
    """Four float32 [N, ceil(elements / 4)] tensors in (0, 1]: word j of every counter. A tensor ``step``: 0-d."""
    i = torch.arange((elements + 3) // 4, dtype=torch.int64, device=seeds.device)[None, :]
    zero = torch.zeros_like(i)
    key = ((seeds & MASK)[:, None], ((seeds >> 32) & MASK)[:, None])
    words = philox((i & MASK, (i >> 32) & MASK, zero + ((step + 1) & MASK), zero), key)
    return [(word >> 8).to(torch.float32) * 2.0**-24 + 2.0**-25 for word in words]


def in_image_order(normals: list[Tensor], shape: tuple[int, ...]) -> Tensor:
    """Four [N, I] tensors -> [N, C, H, W] channels_last: lane = element % 4, element in NHWC order."""
    n, c, h, w = shape
    flat = torch.stack(normals, dim=2).reshape(n, -1)[:, : c * h * w]
    return flat.reshape(n, h, w, c).permute(0, 3, 1, 2)


def philox_normal(
    seeds: Tensor,  # [N] int64
    shape: tuple[int, ...],  # N, C, H, W
    step: int | Tensor,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    normals = []
    u = [value.double() for value in uniforms(seeds, math.prod(shape[1:]), step)]
    for u1, u2 in ((u[0], u[1]), (u[2], u[3])):
        radius = torch.sqrt(-2.0 * torch.log(u1))
        normals += [radius * torch.cos(2.0 * math.pi * u2), radius * torch.sin(2.0 * math.pi * u2)]
    return in_image_order(normals, shape).to(dtype).contiguous(memory_format=torch.channels_last)
