"""The judge of dynamic_threshold: sort, and interpolate between neighbours, in x's dtype."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from idm_fast.kernels.sampler_update.rows import coefficients, prediction


def dynamic_threshold(
    x: Tensor,  # [N, C, H, W]
    model_output: Tensor,  # [N, C, H, W]
    table: Tensor,  # [T, 8]
    step: int | Tensor,
    quantile: float,
    out: Tensor,  # [N]
) -> Tensor:
    k_x, k_out = coefficients(table, step)[:2]
    ordered = prediction(x, model_output, k_x, k_out).abs().flatten(1).sort(dim=1).values  # NaN counts as the largest
    last = ordered.shape[1] - 1
    low = math.floor(quantile * last)
    value = interpolated(ordered[:, low], ordered[:, min(low + 1, last)], quantile * last - low)
    value = torch.where(ordered[:, -1].isnan(), math.nan, value)
    return out.copy_(value.clamp(min=1.0))


def interpolated(low: Tensor, high: Tensor, weight: float) -> Tensor:
    """``weight`` of the way, from the nearer end; exact where both are the same, infinite ones too."""
    if weight == 0:
        return low
    span = high - low
    between = low + weight * span if weight < 0.5 else high - span * (1 - weight)
    return torch.where(low == high, low, between)
