"""From floats to 8-bit integers: weights by their largest value, activations by what a norm can make of them."""

from __future__ import annotations

import torch
from torch import Tensor

from idm_fast.kernels import check

NAME = "conv2d_int8"
LEVELS = 255.0  # activations: 0..255
LARGEST_WEIGHT = 127.0  # weights: -127..127, symmetric
SILU_ARGMIN, SILU_MIN = -1.2784645, -0.2784645


def quantise_weight(
    weight: Tensor,  # [Cout, C, k, k] or phase weights [4, Cout, C, 2, 2], any float type
) -> tuple[Tensor, Tensor]:
    """(int8 weight in the order that conv2d_int8 takes, float32 scale [Cout] or [4, Cout]).

    ``weight`` ~ scale * int8, symmetric, one scale per output channel (and phase): its largest magnitude becomes 127.
    Raises ``ContractError`` for another shape.
    """
    if weight.dim() not in (4, 5):
        check.fail(NAME, "weight", "of 4 dimensions, or 5 for phases", "[Cout, C, k, k]", list(weight.shape))
    check.floating(NAME, "weight", weight)
    lead = weight.dim() - 3
    wide = weight.detach().float()
    scale = wide.flatten(lead).abs().amax(lead).clamp_min(torch.finfo(torch.float32).tiny * 2**24) / LARGEST_WEIGHT
    steps = (wide / scale[..., None, None, None]).round().clamp(-LARGEST_WEIGHT, LARGEST_WEIGHT).to(torch.int8)
    dense = steps.movedim(lead, -1).contiguous()
    return dense.movedim(-1, lead), scale


def activation_scale(
    weight: Tensor,  # [C] gamma of the norm
    bias: Tensor,  # [C] beta
    scale: Tensor | None = None,  # [N, C]
    shift: Tensor | None = None,  # [N, C]
    *,
    silu: bool = True,
    sigmas: float = 5.0,
) -> Tensor:
    """float32 [1, 2], or [N, 2] with scale and shift: (step, zero point) of silu(norm * weight + bias) as 0..255.

    A normalised value is taken to lie within ``sigmas`` of zero: no data is looked at. Per sample, the range of all
    channels together, widened to hold 0, is cut into 255 steps; what lies outside is clamped. Fewer sigmas give finer
    steps and more clamping. Raises ``ContractError`` where scale and shift do not come together.
    """
    if (scale is None) != (shift is None):
        check.fail(NAME, "scale and shift", "given together", "both or none", "one of them")
    gain, offset = weight.detach().float()[None], bias.detach().float()[None]
    if scale is not None and shift is not None:
        gain, offset = gain * (1 + scale.float()), offset * (1 + scale.float()) + shift.float()
    low, high = activation_range(gain, offset, silu, sigmas)
    step = ((high - low) / LEVELS).clamp_min(1e-12)
    return torch.stack([step, (-low / step).round().clamp(0, LEVELS)], 1)


def activation_range(gain: Tensor, offset: Tensor, silu: bool, sigmas: float) -> tuple[Tensor, Tensor]:
    """Least and largest value [N], zero among them, of (silu of) gain * v + offset [N, C] for |v| <= sigmas."""
    spread = gain.abs() * sigmas
    low, high = (offset - spread).amin(1), (offset + spread).amax(1)
    if silu:  # falls to its minimum, then rises
        ends = torch.stack([low, high])
        ends = ends * torch.sigmoid(ends)
        bottom = torch.where((low < SILU_ARGMIN) & (high > SILU_ARGMIN), SILU_MIN, ends.amin(0))
        low, high = bottom, ends.amax(0)
    return low.clamp_max(0), high.clamp_min(0)
