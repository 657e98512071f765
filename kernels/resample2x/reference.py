"""The judge of resample2x, in float32 or what x has that is better."""

from __future__ import annotations

import torch
from torch import Tensor


def resample2x(
    x: Tensor,  # [N, C, H, W]
    up: bool,
    out: Tensor,  # [N, C, 2H, 2W] or [N, C, H / 2, W / 2]
) -> None:
    n, c, h, w = x.shape
    if up:
        out.copy_(x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3))
    else:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        out.copy_(wide.reshape(n, c, h // 2, 2, w // 2, 2).mean(dim=(3, 5)))
