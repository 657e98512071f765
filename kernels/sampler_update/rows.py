"""A step's coefficients, and x0_hat as they make it, for the backends in torch; nothing is read back from a device."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def coefficients(table: Tensor, step: int | Tensor) -> tuple[Tensor, ...]:
    """The columns of row ``step`` as tensors without dimensions; a tensor step outside the table is the nearest row."""
    if isinstance(step, Tensor):
        return table.index_select(0, step.reshape(1).clamp(0, table.shape[0] - 1))[0].unbind()
    return table[step].unbind()


def clamped(step: int | Tensor, rows: int) -> int | Tensor:
    """``step``, without dimensions and inside the table where it is a tensor."""
    return step.reshape(()).clamp(0, rows - 1) if isinstance(step, Tensor) else step


def prediction(x: Tensor, model_output: Tensor, k_x: Tensor, k_out: Tensor) -> Tensor:
    """x0_hat as the network says it, in x's dtype."""
    return k_x * x + k_out * model_output.to(x.dtype)


def limited(x0_hat: Tensor, clamp: Tensor, threshold: Tensor | None) -> Tensor:
    if threshold is not None:
        limit = threshold.to(x0_hat.dtype).reshape(-1, 1, 1, 1)
        return torch.clamp(x0_hat, -limit, limit) / limit
    limit = torch.where(clamp > 0, clamp, math.inf)
    return torch.clamp(x0_hat, -limit, limit)
