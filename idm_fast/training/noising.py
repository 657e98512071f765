"""What a training step shows the network: its items' noised targets, some built from the network's own answer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from idm_fast.diffusion.schedule import Array, Schedule
from idm_fast.kernels import philox_normal

_STEP_NOISE, _START_NOISE = 0, 1  # streams of an item's noise
Answer = Callable[[Tensor, Tensor, Tensor], Tensor]


def item_seeds(first: int, count: int, stride: int, seed: int) -> Tensor:
    """int64 [count]: the noise keys of the items ``first``, ``first + stride``, ... of the run ``seed``."""
    return torch.arange(first, first + count * stride, stride) + ((seed % 2**22) << 40)


def noised(
    schedule: Schedule,
    times: Array,  # [N]
    x0: Tensor,  # [N, C, H, W]
    cond: Tensor,  # [N, D, H, W]
    seeds: Tensor,  # [N] int64
    answer: Answer,
    rolled: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(x_t = alpha x0 + sigma noise, the network's time [N], the signal-to-noise ratio [N]) of a batch.

    For the last ``rolled`` items x0 is the network's one-step ``answer(x, t, cond)`` to pure noise, taken without
    gradients: sampling will ask it to improve on itself.
    """
    device, (count, channels, height, width) = x0.device, x0.shape
    signal, noise = schedule.alpha_sigma(times)
    alpha, sigma = torch.from_numpy(signal).float().to(device), torch.from_numpy(noise).float().to(device)
    t = torch.from_numpy(schedule.network_time(times)).float().to(device)
    eps = philox_normal(seeds, (count, channels, height, width), _STEP_NOISE, device)
    source = x0
    if rolled:
        start = philox_normal(seeds[-rolled:], (rolled, channels, height, width), _START_NOISE, device)
        last = schedule.t_max if schedule.size is None else schedule.size - 1
        latest = torch.full((rolled,), float(schedule.network_time(last)), device=device)
        with torch.no_grad():
            made = answer(start, latest, cond[count - rolled :])
        source = torch.cat([x0[: count - rolled], made.float()])
    x_t = alpha[:, None, None, None] * source + sigma[:, None, None, None] * eps
    return x_t, t, (alpha / sigma.clamp(min=1e-4)).square()
