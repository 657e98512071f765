"""A step's coefficients, and x0_hat as they make it, for the backends in torch; nothing is read back from a device."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def coefficients(table: Tensor, step: int | Tensor) -> tuple[Tensor, ...]:
    """The columns of row ``step`` as tensors without dimensions; a tensor step outside the table is the nearest row."""
    if isinstance(step, Tensor):
        return table.index_select(0, step.reshape(1).clamp(0, table.shape[0] - 1))[0].unbind()
    return table[step].unbind()


def clamped(step: int | Tensor, rows: int) -> int | Tensor:
    """``step``, without dimensions and inside the table where it is a tensor."""
    return step.reshape(()).clamp(0, rows - 1) if isinstance(step, Tensor) else step


def prediction(
    x: Tensor,  # [N, C, H, W]
    model_output: Tensor,  # [N, C, H, W] or [N, C f^2, H / f, W / f]
    k_x: Tensor,
    k_out: Tensor,
    unshuffle: int = 1,
    base: Tensor | None = None,  # [N, C, H, W]
) -> Tensor:
    """x0_hat as the network says it, in x's dtype."""
    output = model_output if model_output.shape == x.shape else F.pixel_shuffle(model_output, unshuffle)
    output = output.to(x.dtype)
    return k_x * x + k_out * (output if base is None else output + base)


def limited(x0_hat: Tensor, clamp: Tensor, threshold: Tensor | None) -> Tensor:
    if threshold is not None:
        limit = threshold.to(x0_hat.dtype).reshape(-1, 1, 1, 1)
        return torch.clamp(x0_hat, -limit, limit) / limit
    limit = torch.where(clamp > 0, clamp, math.inf)
    return torch.clamp(x0_hat, -limit, limit)
