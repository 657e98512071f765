"""Group norm with optional time scale and shift, and SiLU, in one operation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from idm_fast.kernels import check
from idm_fast.kernels.channel_stats import ChannelStats, check_stats
from idm_fast.kernels.dispatch import ANY_FLOAT, FLOATS, Backend, Op, forced_backends
from idm_fast.kernels.extension import fresh
from idm_fast.kernels.interpreter import second_axis, triton_condition
from idm_fast.kernels.norm_coefficients import check_affine

NAME = "group_norm_silu"


def group_norm_silu(
    x: Tensor,  # [N, C1, H, W] channels_last
    num_groups: int,
    weight: Tensor | None = None,  # [C]
    bias: Tensor | None = None,  # [C]
    *,
    eps: float = 1e-5,
    scale: Tensor | None = None,  # [N, C]
    shift: Tensor | None = None,  # [N, C]
    silu: bool = True,
    skip: Tensor | None = None,  # [N, C2, H, W] channels_last
    stats: ChannelStats | None = None,  # of x
    skip_stats: ChannelStats | None = None,  # of skip
    out: Tensor | None = None,  # [N, C, H, W] channels_last
) -> Tensor:
    """y = silu(((x - mean_g) / sqrt(var_g + eps) * weight + bias) * (1 + scale) + shift).

    Mean and (biased) variance run over the C / num_groups channels and H * W positions of a group of one sample, in
    float32 or better. ``scale`` and ``shift`` come together or not at all and may be slices with dense rows;
    parameters are float32 or of x's dtype. With ``skip`` the result is that of torch.cat([x, skip], 1), C = C1 + C2,
    which is never made; groups may straddle the seam. Where ``stats`` or ``skip_stats`` are given they are taken for
    the statistics of that tensor, which is then read once only. ``out`` may be ``x`` itself where there is no
    ``skip``. Returns a tensor of x's dtype and layout.

    Raises ``ContractError`` for arguments outside the contract and ``BackendError`` where no backend can run.
    Source: Wu & He, "Group Normalization", ECCV 2018; scale-shift as in guided-diffusion (arXiv 2105.05233).
    """
    key = None
    if stats is None and skip_stats is None and out is None:  # as the networks call it
        check.no_autograd(NAME, x, weight, bias, scale, shift, skip)
        key = (*map(_facts, (x, weight, bias, scale, shift, skip)), num_groups, forced_backends())
        again = OP.prepared(key)
        if again is not None:
            made: Tensor = again(x, num_groups, weight, bias, eps, scale, shift, silu, skip)
            return made
    check.no_autograd(NAME, x, skip, out)
    if x.dim() != 4:
        check.fail(NAME, "x", "4-dimensional", "[N, C, H, W]", list(x.shape))
    check.floating(NAME, "x", x)
    check.nhwc(NAME, "x", x)
    n, c, h, w = x.shape
    if skip is not None:
        if skip.dim() != 4:
            check.fail(NAME, "skip", "4-dimensional", "[N, C, H, W]", list(skip.shape))
        check.shape_is(NAME, "skip", skip, "[N, C2, H, W] of x", (n, skip.shape[1], h, w))
        check.dtype_in(NAME, "skip", skip, (x.dtype,))
        check.device_is(NAME, "skip", skip, x.device)
        check.nhwc(NAME, "skip", skip)
        c += skip.shape[1]
    check_affine(NAME, x.device, (n, c), num_groups, weight, bias, scale, shift, (torch.float32, x.dtype))
    if stats is not None:
        check_stats(NAME, "stats", stats, x)
    if skip_stats is not None:
        if skip is None:
            check.fail(NAME, "skip_stats", "given with skip", "none", "statistics of no tensor")
        check_stats(NAME, "skip_stats", skip_stats, skip)
    if out is not None:
        check.shape_is(NAME, "out", out, "of x's shape" if skip is None else "[N, C1 + C2, H, W]", (n, c, h, w))
        check.dtype_in(NAME, "out", out, (x.dtype,))
        check.device_is(NAME, "out", out, x.device)
        check.nhwc(NAME, "out", out)
        check.apart(NAME, "out", out, "x", x, same_ok=skip is None)
        if skip is not None:
            check.apart(NAME, "out", out, "skip", skip)
        read = {"weight": weight, "bias": bias, "scale": scale, "shift": shift}
        for name, given in (("stats", stats), ("skip_stats", skip_stats)):
            if given is not None:
                read |= {f"{name}.partials": given.partials, f"{name}.counts": given.counts}
        check.all_apart(NAME, {"out": out}, {name: tensor for name, tensor in read.items() if tensor is not None})
    else:
        out = fresh(torch.empty_like(x) if skip is None else empty_beside(x, skip))
    if out.numel() == 0:
        return out
    arguments = (x, num_groups, weight, bias, eps, scale, shift, silu, skip, stats, skip_stats, out)
    run = OP.choose(x.device, x.dtype, *arguments)
    run(*arguments)
    if key is not None:
        # Asking all this again would take longer than a small layer.
        OP.remember(key, getattr(run, "prepare", _prepare)(run, x, weight, bias, scale, shift, skip, out))
    return out


def _facts(tensor: Tensor | None) -> tuple[object, ...] | None:
    return None if tensor is None else (tensor.shape, tensor.stride(), tensor.dtype, tensor.device)


def _prepare(run: Callable[..., None], *tensors: Tensor | None) -> Callable[..., Tensor]:
    """``tensors`` are x, weight, bias, scale, shift, skip and out of a call that looks like those to come."""

    def again(x: Tensor, *rest: Any) -> Tensor:
        skip: Tensor | None = rest[-1]
        out = fresh(torch.empty_like(x) if skip is None else empty_beside(x, skip))
        run(x, *rest, None, None, out)
        return out

    return again


def empty_beside(x: Tensor, skip: Tensor) -> Tensor:
    """Room for [N, C1 + C2, H, W] channels_last."""
    n, c1, h, w = x.shape
    c = c1 + skip.shape[1]
    return torch.empty_strided((n, c, h, w), (h * w * c, 1, w * c, c), dtype=x.dtype, device=x.device)


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
            limits=second_axis,
            condition=triton_condition,
        ),
        Backend("cuda", f"{__name__}.cuda:group_norm_silu", frozenset({"cuda"}), FLOATS, min_capability=(8, 0)),
        Backend("cpu", f"{__name__}.native:group_norm_silu", frozenset({"cpu"}), FLOATS),
        Backend("torch", f"{__name__}.torch_backend:group_norm_silu", frozenset({"cpu", "cuda"}), ANY_FLOAT),
        Backend("reference", f"{__name__}.reference:group_norm_silu", frozenset({"cpu", "cuda"}), ANY_FLOAT),
    ],
)
