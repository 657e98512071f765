"""The judge of sampler_update: the formula in torch operators, in x's dtype (float64 where the judge speaks)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from idm_fast.kernels.philox_normal.reference import philox_normal
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
    noise = philox_normal(seeds, tuple(x.shape), clamped(step, table.shape[0]), x.dtype)
    # Chosen, not multiplied by zero: an unwritten history may hold NaN. No `if`: it would wait for the device.
    past, noise = torch.where(c != 0, c * history, 0.0), torch.where(s != 0, s * noise, 0.0)
    x.copy_(a * x + b * x0_hat + past + noise)
    history.copy_(x0_hat)
    if network_input is not None:
        network_input.copy_(F.pixel_unshuffle(x, unshuffle))
