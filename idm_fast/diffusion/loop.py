"""The sampling loop: network, fused update, network, fused update. Nothing in it waits for the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from idm_fast.diffusion.guidance import Guidance
from idm_fast.diffusion.table import COLUMNS, SamplerTable
from idm_fast.errors import IdmFastError
from idm_fast.kernels.philox_normal import philox_normal
from idm_fast.kernels.sampler_update import sampler_update

Denoiser = Callable[[Tensor, Tensor], Tensor]
Callback = Callable[[int, Tensor, Tensor], None]
_INITIAL = -1  # the noise counter's "step" of the initial noise; evaluations count from 0


@torch.no_grad()
def sample(
    denoise: Denoiser,
    table: SamplerTable,
    x: Tensor,  # [N, C, H, W]
    seeds: Tensor,  # [N] int64
    *,
    callback: Callback | None = None,
    guidance: Guidance | None = None,
    network_dtype: torch.dtype | None = None,
) -> Tensor:
    """Walks ``table`` from ``x`` and returns the restored images: float32 [N, C, H, W], channels_last.

    - ``denoise(x, t)``: x [N, C, H, W] channels_last in ``network_dtype`` (None: float32), t [N] float32 network time;
      returns [N, C, H, W] in any float type, not sharing memory with x; or [N, 2 C, H, W], whose second half says the
      variance and is read where ``table.learned_variance``.
    - ``x``: what the walk begins with (``initial_noise`` or ``noised_start``), on any layout; it is not changed.
    - ``seeds``: one per image. An image's noise depends on its own seed only, so a batch equals its singles.
    - ``callback(e, x, x0_hat)`` after evaluation e; both tensors are reused, copy what is to be kept.
    - ``guidance`` moves x0_hat at the evaluations that it chooses, before the callback.

    Errors: ``IdmFastError`` for a wrong x or seeds; the kernel's ``ContractError`` for a wrong network output.
    """
    if x.dim() != 4 or not x.is_floating_point():
        raise IdmFastError(f"sample: x must be a float [N, C, H, W], got {x.dtype} {list(x.shape)}")
    _check_seeds("sample", seeds, x.shape[0], x.device)
    x = x.to(torch.float32, copy=True, memory_format=torch.channels_last)
    history = torch.empty_like(x)
    network_input = None
    if network_dtype not in (None, torch.float32):
        network_input = x.to(network_dtype, memory_format=torch.channels_last)
    rows, times = table.float32(x.device), table.times(x.shape[0], x.device)
    steer = None if guidance is None else guidance.begin(table)
    for e in range(table.evaluations):
        out, spread = _halves(denoise(x if network_input is None else network_input, times[e]), x.shape[1])
        if table.learned_variance:
            if spread is None:
                expected = f"{2 * x.shape[1]} channels for a learned variance"
                raise IdmFastError(f"sample: network output must have {expected}, got {out.shape[1]}")
            spread_noise(history, spread, seeds, e, rows[e, COLUMNS.index("spread")])
        sampler_update(x, out, history, rows, e, seeds, network_input=network_input)
        if steer is not None and steer(e, x, history) and network_input is not None:
            network_input.copy_(x)
        if callback is not None:
            callback(e, x, history)
    return x


def initial_noise(seeds: Tensor, shape: Sequence[int], device: torch.device | str) -> Tensor:
    """x_T ~ N(0, I): float32 ``shape`` = [N, C, H, W], channels_last, image n drawn from seeds[n] alone."""
    if len(shape) != 4 or min(shape) < 1:
        raise IdmFastError(f"initial_noise: shape must be [N, C, H, W], got {list(shape)}")
    n, channels, height, width = shape
    _check_seeds("initial_noise", seeds, n, torch.device(device))
    return philox_normal(seeds, (n, channels, height, width), _INITIAL, device)


def noised_start(image: Tensor, table: SamplerTable, seeds: Tensor) -> Tensor:
    """alpha_start image + sigma_start n: the start of a walk that begins part of the way ("strength", DifFace).

    image: [N, C, H, W] in [-1, 1], an estimate of x0 (the degraded image, or a regression restorer's result).
    """
    image = image.to(torch.float32)
    noise = initial_noise(seeds, image.shape, image.device)
    return (table.sigma_start * noise).add_(image, alpha=table.alpha_start)


def spread_noise(history: Tensor, v: Tensor, seeds: Tensor, e: int, spread: Tensor) -> None:
    """history = exp(spread v) noise of evaluation ``e``: what ``c`` weighs in a table of ``learned_variance``."""
    n, channels, height, width = history.shape
    noise = philox_normal(seeds, (n, channels, height, width), e, history.device)
    history.copy_(noise.mul_(torch.exp(spread * v.float())))


def _halves(out: Tensor, channels: int) -> tuple[Tensor, Tensor | None]:
    """What the network says of the picture, and of the variance where it has twice the channels."""
    if out.dim() != 4 or out.shape[1] != 2 * channels:
        return out, None
    return out[:, :channels].contiguous(memory_format=torch.channels_last), out[:, channels:]


def _check_seeds(name: str, seeds: Tensor, batch: int, device: torch.device) -> None:
    fits = seeds.dtype == torch.int64 and list(seeds.shape) == [batch]
    if not fits:
        raise IdmFastError(f"{name}: seeds must be int64 [N] = [{batch}], got {seeds.dtype} {list(seeds.shape)}")
    if seeds.device.type != device.type:
        raise IdmFastError(f"{name}: seeds must be on the images' device = {device}, got {seeds.device}")
