"""Convolution of NHWC images with the norm before it, the sums after it and the statistics of its result fused in."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from idm_fast.kernels.channel_stats import ChannelStats
from idm_fast.kernels.conv2d.contract import NAME, Arguments, check_arguments, output_shape
from idm_fast.kernels.conv2d.phases import phase_weights as phase_weights
from idm_fast.kernels.dispatch import ANY_FLOAT, FLOATS, Backend, Op
from idm_fast.kernels.interpreter import triton_condition


# fmt: off
@overload
def conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, stride: int = 1, upsample: bool = False,
    skip: Tensor | None = None, coefficients: Tensor | None = None, silu: bool = False,
    shortcut: Tensor | None = None, shortcut_skip: Tensor | None = None, shortcut_weight: Tensor | None = None,
    time_shift: Tensor | None = None, residual: Tensor | None = None, with_stats: Literal[False] = False,
    out: Tensor | None = None,
) -> Tensor: ...
@overload
def conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, stride: int = 1, upsample: bool = False,
    skip: Tensor | None = None, coefficients: Tensor | None = None, silu: bool = False,
    shortcut: Tensor | None = None, shortcut_skip: Tensor | None = None, shortcut_weight: Tensor | None = None,
    time_shift: Tensor | None = None, residual: Tensor | None = None, with_stats: Literal[True],
    out: Tensor | None = None,
) -> tuple[Tensor, ChannelStats]: ...
# fmt: on
def conv2d(
    x: Tensor,  # [N, C1, H, W] channels_last
    weight: Tensor,  # [Cout, C, k, k] channels_last; with upsample the phase weights [4, Cout, C, 2, 2]
    bias: Tensor | None = None,  # [Cout]
    *,
    stride: int = 1,
    upsample: bool = False,
    skip: Tensor | None = None,  # [N, C2, H, W]: C = C1 + C2
    coefficients: Tensor | None = None,  # [N, 3, C] float32
    silu: bool = False,
    shortcut: Tensor | None = None,  # [N, Cs1, Ho, Wo]
    shortcut_skip: Tensor | None = None,  # [N, Cs2, Ho, Wo]
    shortcut_weight: Tensor | None = None,  # [Cout, Cs1 + Cs2]
    time_shift: Tensor | None = None,  # [N, Cout], dense rows
    residual: Tensor | None = None,  # [N, Cout, Ho, Wo]
    with_stats: bool = False,
    out: Tensor | None = None,  # [N, Cout, Ho, Wo]
) -> Tensor | tuple[Tensor, ChannelStats]:
    """y = conv(silu((cat(x, skip) - centre) * gain + offset)) + bias + shortcut_weight @ cat(shortcut, shortcut_skip)
    + time_shift + residual.

    k is 1 or 3; ``stride`` 1, or 2 with k = 3. Zeros pad k // 2 positions on each side *after* the prologue: a border
    is 0, not silu(offset). ``coefficients`` rows are (centre, gain, offset), as ``norm_coefficients`` makes them; what
    the prologue gives is rounded to x's dtype before the product. Concatenations are never written to memory, and the
    shortcut takes raw values. ``upsample``: nearest-neighbour 2x before a 3x3 convolution, as four 2x2 convolutions
    with the weights of ``phase_weights``; Ho, Wo = 2 H, 2 W. ``with_stats``: also the ``ChannelStats`` of the values
    as they were stored. bias and time_shift are float32 or of x's dtype; everything else has x's dtype; sums run in
    float32 or better in an order fixed by the shapes. ``out`` may not overlap any input.

    Raises ``ContractError`` for arguments outside the contract and ``BackendError`` where no backend can run.
    Source: for the phases, the sub-pixel view of a convolution, Shi et al. (arXiv 1609.07009).
    """
    arguments: Arguments = (
        x, weight, bias, stride, upsample, skip, coefficients, silu, shortcut, shortcut_skip, shortcut_weight,
        time_shift, residual, with_stats, out,
    )  # fmt: skip
    shape = check_arguments(*arguments)
    if x.shape[0] == 0:  # an empty batch: nothing to compute
        result = empty_nhwc(shape, x) if out is None else out
        if not with_stats:
            return result
        partials = result.new_empty((0, 1, 2, shape[1]), dtype=torch.promote_types(x.dtype, torch.float32))
        return result, ChannelStats(partials, partials.new_full((1,), float(shape[2] * shape[3])))
    computed: Any = OP.run(x.device, x.dtype, *arguments)
    return computed  # type: ignore[no-any-return]


def empty_nhwc(shape: tuple[int, int, int, int], like: Tensor) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _gpu_limits(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, upsample: bool, *_: Any) -> str | None:
    """Positions are counted in 32 bits inside a sample; offsets of elements, and of samples, in 64."""
    shape = output_shape(x, weight, stride, upsample)
    most = 2**31 - 1
    return (
        None if max(shape[2] * shape[3], x.shape[2] * x.shape[3]) <= most else f"takes up to {most} positions a sample"
    )


HALVES = frozenset({torch.float16, torch.bfloat16})  # what tensor cores multiply without losing digits

OP = Op(
    NAME,
    "conv(silu(norm(cat(x, skip)))) + bias + shortcut + time_shift + residual",
    [
        Backend(
            "triton",
            f"{__name__}.triton_kernel:conv2d",
            frozenset({"cuda", "cpu"}),
            FLOATS,
            min_capability=(8, 0),
            limits=_gpu_limits,
            condition=triton_condition,
        ),
        Backend("cuda", f"{__name__}.cuda:conv2d", frozenset({"cuda"}), HALVES, (8, 0), _gpu_limits),
        Backend("cpu", f"{__name__}.native:conv2d", frozenset({"cpu"}), FLOATS),
        Backend("torch", f"{__name__}.torch_backend:conv2d", frozenset({"cpu", "cuda"}), ANY_FLOAT),
        Backend("reference", f"{__name__}.reference:conv2d", frozenset({"cpu", "cuda"}), ANY_FLOAT),
    ],
)
