"""Half or twice the resolution: the mean of 2x2 positions, or each position four times."""

from __future__ import annotations

import torch
from torch import Tensor

from idm_fast.kernels import check
from idm_fast.kernels.dispatch import FLOATS, Backend, Op
from idm_fast.kernels.interpreter import triton_condition

NAME = "resample2x"


def resample2x(
    x: Tensor,  # [N, C, H, W] channels_last
    *,
    up: bool,
    out: Tensor | None = None,  # [N, C, 2H, 2W] or [N, C, H / 2, W / 2] channels_last
) -> Tensor:
    """up: out[h, w] = x[h // 2, w // 2] (nearest).  Else: out[h, w] = mean of x[2h : 2h + 2, 2w : 2w + 2], in float32.

    What guided-diffusion does to the identity of a residual block that changes the resolution. H and W must be even on
    the way down. Raises ``ContractError`` for arguments outside the contract and ``BackendError`` where no backend can
    run. Source: Dhariwal & Nichol, arXiv 2105.05233, appendix.
    """
    check.no_autograd(NAME, x, out)
    if x.dim() != 4:
        check.fail(NAME, "x", "4-dimensional", "[N, C, H, W]", list(x.shape))
    check.floating(NAME, "x", x)
    check.nhwc(NAME, "x", x)
    n, c, h, w = x.shape
    if not up and (h % 2 or w % 2):
        check.fail(NAME, "x", "of even height and width", "[N, C, 2 h, 2 w]", list(x.shape))
    shape = (n, c, 2 * h, 2 * w) if up else (n, c, h // 2, w // 2)
    if out is None:
        out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    else:
        check.shape_is(NAME, "out", out, "of the resampled shape", shape)
        check.dtype_in(NAME, "out", out, (x.dtype,))
        check.device_is(NAME, "out", out, x.device)
        check.nhwc(NAME, "out", out)
        check.apart(NAME, "out", out, "x", x)
    if out.numel():
        OP.run(x.device, x.dtype, x, up, out)
    return out


OP = Op(
    NAME,
    "nearest 2x, or the mean of 2x2 positions",
    [
        Backend(
            "triton",
            f"{__name__}.triton_kernel:resample2x",
            frozenset({"cuda", "cpu"}),
            FLOATS,
            min_capability=(8, 0),
            condition=triton_condition,
        ),
        Backend("cpu", f"{__name__}.native:resample2x", frozenset({"cpu"}), FLOATS),
        Backend("torch", f"{__name__}.torch_backend:resample2x", frozenset({"cpu", "cuda"}), FLOATS),
        Backend("reference", f"{__name__}.reference:resample2x", frozenset({"cpu", "cuda"}), FLOATS),
    ],
)
