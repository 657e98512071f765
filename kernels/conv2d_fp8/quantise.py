"""From floats to e4m3: weights by their largest value, activations by what a norm can make of them."""

from __future__ import annotations

import torch
from torch import Tensor

from idm_fast.kernels import check
from idm_fast.kernels.conv2d_int8.quantise import activation_range

NAME = "conv2d_fp8"
LARGEST = 448.0  # of e4m3 without infinities
E4M3 = torch.float8_e4m3fn


def to_e4m3(values: Tensor) -> Tensor:
    """Nearest e4m3, ties to even; beyond +-448 it is +-448 (what a bare conversion does there differs by version)."""
    return values.clamp(-LARGEST, LARGEST).to(E4M3)


def quantise_weight(
    weight: Tensor,  # [Cout, C, k, k] or phase weights [4, Cout, C, 2, 2], any float type
) -> tuple[Tensor, Tensor]:
    """(e4m3 weight in the order that conv2d_fp8 takes, float32 scale [Cout] or [4, Cout]): weight ~ scale * e4m3.

    The largest magnitude of an output channel (and phase) becomes 448. Raises ``ContractError`` for another shape.
    """
    if weight.dim() not in (4, 5):
        check.fail(NAME, "weight", "of 4 dimensions, or 5 for phases", "[Cout, C, k, k]", list(weight.shape))
    check.floating(NAME, "weight", weight)
    lead = weight.dim() - 3
    wide = weight.detach().float()
    scale = wide.flatten(lead).abs().amax(lead).clamp_min(torch.finfo(torch.float32).tiny * 2**24) / LARGEST
    dense = to_e4m3(wide / scale[..., None, None, None]).movedim(lead, -1).contiguous()
    return dense.movedim(-1, lead), scale


def activation_scale(
    weight: Tensor,  # [C] gamma of the norm
    bias: Tensor,  # [C] beta
    scale: Tensor | None = None,  # [N, C]
    shift: Tensor | None = None,  # [N, C]
    *,
    silu: bool = True,
    sigmas: float = 8.0,
) -> Tensor:
    """float32 [1, 1], or [N, 1] with scale and shift: the factor that makes silu(norm * weight + bias) fit +-448.

    A normalised value is taken to lie within ``sigmas`` of zero; what lies outside is clamped. A float keeps its
    precision over many octaves, so that a wide range costs little, unlike in ``conv2d_int8``.
    Raises ``ContractError`` where scale and shift do not come together.
    """
    if (scale is None) != (shift is None):
        check.fail(NAME, "scale and shift", "given together", "both or none", "one of them")
    gain, offset = weight.detach().float()[None], bias.detach().float()[None]
    if scale is not None and shift is not None:
        gain, offset = gain * (1 + scale.float()), offset * (1 + scale.float()) + shift.float()
    low, high = activation_range(gain, offset, silu, sigmas)
    return (torch.maximum(-low, high) / LARGEST).clamp_min(1e-12)[:, None]
