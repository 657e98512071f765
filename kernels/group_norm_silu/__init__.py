"""Group norm with optional time scale and shift, and SiLU, in one operation."""

from __future__ import annotations

import torch
from torch import Tensor

from idm_fast.kernels import check
from idm_fast.kernels.dispatch import ANY_FLOAT, FLOATS, Backend, Op
from idm_fast.kernels.interpreter import triton_condition

NAME = "group_norm_silu"


def group_norm_silu(
    x: Tensor,  # [N, C, H, W] channels_last
    num_groups: int,
    weight: Tensor | None = None,  # [C]
    bias: Tensor | None = None,  # [C]
    *,
    eps: float = 1e-5,
    scale: Tensor | None = None,  # [N, C]
    shift: Tensor | None = None,  # [N, C]
    silu: bool = True,
    out: Tensor | None = None,  # as x
) -> Tensor:
    """y = silu(((x - mean_g) / sqrt(var_g + eps) * weight + bias) * (1 + scale) + shift).

    Mean and (biased) variance run over the C / num_groups channels and H * W positions of a group of one sample, in
    float32 or better. ``scale`` and ``shift`` come together or not at all and may be slices with dense rows;
    parameters are float32 or of x's dtype. ``out`` may be ``x`` itself. Returns a tensor of x's dtype and layout.

    Raises ``ContractError`` for arguments outside the contract and ``BackendError`` where no backend can run.
    Source: Wu & He, "Group Normalization", ECCV 2018; scale-shift as in guided-diffusion (arXiv 2105.05233).
    """
    check.no_autograd(NAME, x, weight, bias, scale, shift, out)
    if x.dim() != 4:
        check.fail(NAME, "x", "4-dimensional", "[N, C, H, W]", list(x.shape))
    check.floating(NAME, "x", x)
    check.nhwc(NAME, "x", x)
    n, c = x.shape[0], x.shape[1]
    if num_groups < 1 or c % num_groups:
        check.fail(NAME, "num_groups", "a divisor of C", f"divisor of {c}", num_groups)
    if weight is not None:
        _parameter("weight", weight, x, "[C]", (c,))
    if bias is not None:
        _parameter("bias", bias, x, "[C]", (c,))
    if scale is not None and shift is not None:
        _parameter("scale", scale, x, "[N, C]", (n, c))
        _parameter("shift", shift, x, "[N, C]", (n, c))
    elif scale is not None or shift is not None:
        check.fail(NAME, "scale and shift", "given together", "both or none", "one of them")
    if out is not None:
        check.shape_is(NAME, "out", out, "of x's shape", x.shape)
        check.dtype_in(NAME, "out", out, (x.dtype,))
        check.device_is(NAME, "out", out, x.device)
        check.nhwc(NAME, "out", out)
        check.apart(NAME, "out", out, "x", x, same_ok=True)
    if x.numel() == 0:
        return torch.empty_like(x) if out is None else out
    result: Tensor = OP.run(x.device, x.dtype, x, num_groups, weight, bias, eps, scale, shift, silu, out)
    return result


def _parameter(name: str, value: Tensor, x: Tensor, contract: str, shape: tuple[int, ...]) -> None:
    check.shape_is(NAME, name, value, contract, shape)
    if value.dtype != x.dtype and value.dtype != torch.float32:
        check.dtype_in(NAME, name, value, (torch.float32, x.dtype))
    check.device_is(NAME, name, value, x.device)
    check.last_dim_dense(NAME, name, value)


OP = Op(
    NAME,
    "silu(group_norm(x) * (1 + scale) + shift)",
    [
        Backend(
            "triton",
            f"{__name__}.triton_kernel:group_norm_silu",
            frozenset({"cuda", "cpu"}),
            FLOATS,
            min_capability=(8, 0),
            condition=triton_condition,
        ),
        Backend("cpu", f"{__name__}.native:group_norm_silu", frozenset({"cpu"}), FLOATS),
        Backend("torch", f"{__name__}.torch_backend:group_norm_silu", frozenset({"cpu", "cuda"}), ANY_FLOAT),
        Backend("reference", f"{__name__}.reference:group_norm_silu", frozenset({"cpu", "cuda"}), ANY_FLOAT),
    ],
)
