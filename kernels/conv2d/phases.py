"""Nearest-neighbour 2x and a 3x3 convolution as four 2x2 convolutions, one for each parity of (row, column)."""

from __future__ import annotations

import torch
from torch import Tensor

from idm_fast.kernels import check

PHASES = 4


def phase_weights(
    weight: Tensor,  # [Cout, C, 3, 3]
) -> Tensor:
    """[4, Cout, C, 2, 2] in the memory order [4][Cout][2][2][C], phase = 2 * row parity + column parity.

    Of three neighbouring rows of the upsampled image two are the same source row, so their weights add up: an even
    output row 2i reads (i - 1: w0), (i: w1 + w2), an odd one (i: w0 + w1), (i + 1: w2), and columns likewise. 4/9 of
    the products, the same result. Sums run in float32 or better and are rounded once, to ``weight``'s dtype: make
    phases from the widest weights there are.

    Raises ``ContractError`` for another shape.
    """
    if weight.dim() != 4 or weight.shape[2:] != (3, 3):
        check.fail("phase_weights", "weight", "3x3 weights", "[Cout, C, 3, 3]", list(weight.shape))
    wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    rows = [_pairs(wide, 2, parity) for parity in (0, 1)]
    phases = torch.stack([_pairs(row, 3, parity) for row in rows for parity in (0, 1)])
    dense = phases.permute(0, 1, 3, 4, 2).to(weight.dtype).contiguous()
    return dense.permute(0, 1, 4, 2, 3)


def _pairs(weight: Tensor, dim: int, parity: int) -> Tensor:
    """Three taps along ``dim`` -> the two of one parity."""
    first, second, third = weight.unbind(dim)
    return torch.stack([first, second + third] if parity == 0 else [first + second, third], dim)
