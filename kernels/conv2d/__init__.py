"""Convolution of NHWC images with the norm before it, the sums after it and the statistics of its result fused in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, overload

import torch
from torch import Tensor

from idm_fast.kernels.channel_stats import ChannelStats
from idm_fast.kernels.conv2d.contract import (
    NAME,
    Arguments,
    Shape,
    check_arguments,
    check_bound,
    position_limit,
    stats_room,
)
from idm_fast.kernels.conv2d.packed_weight import PackedWeight as PackedWeight
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
    out: Tensor | None = None, out_stats: ChannelStats | None = None,
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
    out_stats: ChannelStats | None = None,  # as made by conv2d_stats
) -> Tensor | tuple[Tensor, ChannelStats]:
    """y = conv(silu((cat(x, skip) - centre) * gain + offset)) + bias + shortcut_weight @ cat(shortcut, shortcut_skip)
    + time_shift + residual.

    k is 1 or 3; ``stride`` 1, or 2 with k = 3. Zeros pad k // 2 positions on each side *after* the prologue: a border
    is 0, not silu(offset). ``coefficients`` rows are (centre, gain, offset), as ``norm_coefficients`` makes them; what
    the prologue gives is rounded to x's dtype before the product. Concatenations are never written to memory, and the
    shortcut takes raw values. ``upsample``: nearest-neighbour 2x before a 3x3 convolution, as four 2x2 convolutions
    with the weights of ``phase_weights``; Ho, Wo = 2 H, 2 W. ``with_stats``: also the ``ChannelStats`` of the values
    as they were stored. bias and time_shift are float32 or of x's dtype; everything else has x's dtype; sums run in
    float32 or better in an order fixed by the shapes. ``out`` and ``out_stats`` overlap nothing.

    A weight that many calls use is packed once as a ``PackedWeight``, which goes where the weight goes. Where the same
    call comes again and again, ``bind_conv2d`` decides and checks it once; nothing is then allocated on a CPU.

    Raises ``ContractError`` for arguments outside the contract and ``BackendError`` where no backend can run.
    Source: for the phases, the sub-pixel view of a convolution, Shi et al. (arXiv 1609.07009).
    """
    arguments, shape = _checked(
        x, weight, bias, stride=stride, upsample=upsample, skip=skip, coefficients=coefficients, silu=silu,
        shortcut=shortcut, shortcut_skip=shortcut_skip, shortcut_weight=shortcut_weight, time_shift=time_shift,
        residual=residual, with_stats=with_stats, out=out, out_stats=out_stats,
    )  # fmt: skip
    if x.shape[0] == 0:  # an empty batch: nothing to compute
        result = empty_nhwc(shape, x) if out is None else out
        if not with_stats:
            return result
        stats = stats_room(NAME, out_stats, shape, 1, x)
        stats.counts.fill_(float(shape[2] * shape[3]))
        return result, stats
    computed: Any = OP.run(x.device, x.dtype, *arguments)
    return computed  # type: ignore[no-any-return]


def conv2d_stats(x: Tensor, weight: Tensor, bias: Tensor | None = None, **options: Any) -> ChannelStats:
    """Room for the statistics of ``conv2d`` with the same arguments, in as many pieces as the backend makes of them."""
    arguments, shape = _checked(x, weight, bias, **options)
    return stats_room(NAME, None, shape, OP.pieces(x.device, x.dtype, *arguments) if len(x) else 1, x)


def bind_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None, **options: Any) -> Callable[[], Any]:
    """``conv2d`` of these very tensors, to be called many times: backend, checks and packed weights are seen to now.

    ``out`` must be given, and ``out_stats`` with ``with_stats``: they are what a call writes. It reads what the others
    hold by then; a weight that has changed is seen where it is a ``PackedWeight`` and was changed by ``load``.
    """
    arguments, _ = _checked(x, weight, bias, **options)
    check_bound(NAME, x, *arguments[-3:])
    return OP.bind(x.device, x.dtype, *arguments)


def _checked(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, stride: int = 1, upsample: bool = False,
    skip: Tensor | None = None, coefficients: Tensor | None = None, silu: bool = False,
    shortcut: Tensor | None = None, shortcut_skip: Tensor | None = None, shortcut_weight: Tensor | None = None,
    time_shift: Tensor | None = None, residual: Tensor | None = None, with_stats: bool = False,
    out: Tensor | None = None, out_stats: ChannelStats | None = None,
) -> tuple[Arguments, Shape]:  # fmt: skip
    """The options of ``conv2d`` in the order of a backend, and the shape of the result."""
    arguments: Arguments = (
        x, weight, bias, stride, upsample, skip, coefficients, silu, shortcut, shortcut_skip, shortcut_weight,
        time_shift, residual, with_stats, out, out_stats,
    )  # fmt: skip
    return arguments, check_arguments(*arguments)


def empty_nhwc(shape: tuple[int, int, int, int], like: Tensor) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _gpu_limits(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, upsample: bool, *_: Any) -> str | None:
    return position_limit(x, weight, stride, upsample)


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
