"""sampler_update in plain torch operators, float32; on a GPU nothing is read back to the host."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from idm_fast.kernels.sampler_update.reference import in_image_order, uniforms


def sampler_update(
    x: Tensor,  # [N, C, H, W]
    model_output: Tensor,  # [N, C, H, W]
    history: Tensor,  # [N, C, H, W]
    table: Tensor,  # [T, 8]
    step: int,
    seeds: Tensor,  # [N]
    network_input: Tensor | None,
) -> None:
    k_x, k_out, a, b, c, s, clamp, _ = table[step].unbind()
    x0_hat = k_x * x + k_out * model_output.to(torch.float32)
    limit = torch.where(clamp > 0, clamp, math.inf)
    x0_hat = torch.clamp(x0_hat, -limit, limit)
    x.mul_(a).add_(b * x0_hat)
    on_host = not table.is_cuda
    if not (on_host and c == 0):
        x.add_(torch.where(c == 0, 0.0, c * history))
    if not (on_host and s == 0):
        x.add_(s * normal(seeds, tuple(x.shape), step))
    history.copy_(x0_hat)
    if network_input is not None:
        network_input.copy_(x)


def normal(seeds: Tensor, shape: tuple[int, ...], step: int) -> Tensor:
    """The noise of reference.philox_normal with the elementary functions in float32."""
    u = uniforms(seeds, math.prod(shape[1:]), step)
    normals = []
    for u1, u2 in ((u[0], u[1]), (u[2], u[3])):
        radius = torch.sqrt(-2.0 * torch.log(u1))
        angle = 2.0 * math.pi * u2
        normals += [radius * torch.cos(angle), radius * torch.sin(angle)]
    return in_image_order(normals, shape)
