"""dynamic_threshold in torch operators: torch.kthvalue selects where torch.quantile sorts and refuses large images."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from idm_fast.kernels.dynamic_threshold.reference import interpolated
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
    sizes = prediction(x, model_output, k_x, k_out).abs().flatten(1)
    last = sizes.shape[1] - 1
    low = math.floor(quantile * last)
    below, above = (sizes.kthvalue(place + 1, dim=1).values for place in (low, min(low + 1, last)))
    value = interpolated(below, above, quantile * last - low)
    value = torch.where(sizes.isnan().any(dim=1), math.nan, value)
    return out.copy_(value.clamp(min=1.0))
