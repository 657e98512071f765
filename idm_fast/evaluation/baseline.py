"""The plain baseline: denoise, then sharpen. What a restorer that has learnt nothing would do.

    d(p) = sum_q w(p, q) y(q) / sum_q w(p, q),   w = exp(-max(|P_p - P_q|^2 - 2 s^2, 0) / h^2)     (non-local means)
    out  = d + amount * (d - blur(d))                                                             (unsharp mask)

Source: Buades, Coll, Morel, CVPR 2005.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def estimate_noise(y: Tensor) -> Tensor:
    """Standard deviation [N] of the noise in ``y`` [N, C, H, W], in its own units.

    The median absolute response to a second-difference mask, which smooth parts and a minority of edges leave
    alone, at full, half and a quarter of the resolution, the largest of them: a degraded face was enlarged after the
    noise was added, so that its noise is smooth at full resolution.
    Source of the mask: Immerkaer, "Fast Noise Variance Estimation", CVIU 64(2), 1996.
    """
    kernel = torch.tensor([[1.0, -2, 1], [-2, 4, -2], [1, -2, 1]], device=y.device).view(1, 1, 3, 3)
    planes = y.float().flatten(0, 1).unsqueeze(1)
    estimates = []
    for _ in range(3):
        if min(planes.shape[2:]) < 3:
            break
        response = F.conv2d(planes, kernel).view(*y.shape[:2], -1)
        # The mask's weights have a root sum of squares of 6; 0.6745 is the median of a standard normal's modulus.
        estimates.append(response.abs().median(dim=2).values.mean(dim=1) / (6 * 0.6745))
        planes = F.avg_pool2d(planes, 2)
    return torch.stack(estimates).amax(dim=0)


def gaussian_blur(x: Tensor, sigma: float) -> Tensor:
    """``x`` [N, C, H, W] blurred by a Gaussian of ``sigma`` pixels; the border is repeated."""
    radius = max(1, int(3 * sigma + 0.5))
    offsets = torch.arange(-radius, radius + 1, device=x.device, dtype=x.dtype)
    window = torch.exp(-(offsets**2) / (2 * sigma**2))
    window = window / window.sum()
    planes = F.pad(x.flatten(0, 1).unsqueeze(1), (radius,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(planes, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1)).view_as(x)


def non_local_means(y: Tensor, sigma: Tensor, strength: float, patch: int = 5, search: int = 5) -> Tensor:
    """Non-local means of ``y`` [N, C, H, W] for noise of deviation ``sigma`` [N].

    ``patch``: side of the compared windows; ``search``: largest shift in pixels; h = ``strength`` * sigma.
    """
    height, width = y.shape[2:]
    noise = sigma.view(-1, 1, 1, 1) ** 2 + 1e-8
    padded = F.pad(y, (search,) * 4, mode="reflect")
    total, weights = torch.zeros_like(y), torch.zeros_like(y[:, :1])
    for top in range(2 * search + 1):
        for left in range(2 * search + 1):
            moved = padded[:, :, top : top + height, left : left + width]
            apart = (moved - y).square().mean(dim=1, keepdim=True)
            apart = F.avg_pool2d(apart, patch, 1, patch // 2, count_include_pad=False)
            weight = torch.exp(-(apart - 2 * noise).clamp(min=0) / (strength**2 * noise))
            total += weight * moved
            weights += weight
    return total / weights


@torch.no_grad()
def denoise_and_sharpen(
    y: Tensor,  # [N, 3, H, W] in [-1, 1]
    *,
    strength: float = 1.0,
    amount: float = 2.0,
    radius: float = 1.0,  # of the unsharp mask, in pixels of a 128-px face
) -> Tensor:
    """The baseline's restoration of ``y``, same shape and range.

    The defaults had the least LPIPS (AlexNet) of a dozen settings on 48 training faces of the medium test level.
    """
    y = y.float()
    clean = non_local_means(y, estimate_noise(y), strength)
    sharp = clean + amount * (clean - gaussian_blur(clean, radius * y.shape[-1] / 128))
    return sharp.clamp(-1, 1)
