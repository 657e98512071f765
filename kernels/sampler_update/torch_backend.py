"""sampler_update in plain torch operators, float32; on a GPU nothing is read back to the host."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from idm_fast.kernels.philox_normal.torch_backend import philox_normal
from idm_fast.kernels.sampler_update.rows import clamped, coefficients, limited, prediction


def sampler_update(
    x: Tensor,  # [N, C, H, W]
    model_output: Tensor,  # [N, C, H, W] or [N, C f^2, H / f, W / f]
    history: Tensor,  # [N, C, H, W]
    table: Tensor,  # [T, 8]
    step: int | Tensor,
    seeds: Tensor,  # [N]
    network_input: Tensor | None = None,  # [N, C f^2, H / f, W / f]
    threshold: Tensor | None = None,  # [N]
    unshuffle: int = 1,
    base: Tensor | None = None,  # [N, C, H, W]
) -> None:
    k_x, k_out, a, b, c, s, clamp, _ = coefficients(table, step)
    x0_hat = limited(prediction(x, model_output, k_x, k_out, unshuffle, base), clamp, threshold)
    x.mul_(a).add_(b * x0_hat)
    on_host = not table.is_cuda
    if not (on_host and c == 0):
        x.add_(torch.where(c == 0, 0.0, c * history))
    if not (on_host and s == 0):
        x.add_(s * philox_normal(seeds, tuple(x.shape), clamped(step, table.shape[0])))
    history.copy_(x0_hat)
    if network_input is not None:
        network_input.copy_(x if unshuffle == 1 else F.pixel_unshuffle(x, unshuffle))
