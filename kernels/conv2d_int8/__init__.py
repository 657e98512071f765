"""conv2d on 8-bit integers: lossy, asked for by name, with the norm before it and the sums after it fused in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, overload

import torch
from torch import Tensor

from idm_fast.kernels.channel_stats import ChannelStats
from idm_fast.kernels.conv2d.contract import check_bound, stats_room
from idm_fast.kernels.conv2d_int8.contract import Contract
from idm_fast.kernels.conv2d_int8.quantise import NAME
from idm_fast.kernels.conv2d_int8.quantise import activation_scale as activation_scale
from idm_fast.kernels.conv2d_int8.quantise import quantise_weight as quantise_weight
from idm_fast.kernels.dispatch import ANY_FLOAT, FLOATS, Backend, Op


# fmt: off
@overload
def conv2d_int8(
    x: Tensor, weight: Tensor, weight_scale: Tensor, activation: Tensor, bias: Tensor | None = None, *,
    stride: int = 1, upsample: bool = False, skip: Tensor | None = None, coefficients: Tensor | None = None,
    silu: bool = False, time_shift: Tensor | None = None, residual: Tensor | None = None,
    with_stats: Literal[False] = False, out: Tensor | None = None,
) -> Tensor: ...
@overload
def conv2d_int8(
    x: Tensor, weight: Tensor, weight_scale: Tensor, activation: Tensor, bias: Tensor | None = None, *,
    stride: int = 1, upsample: bool = False, skip: Tensor | None = None, coefficients: Tensor | None = None,
    silu: bool = False, time_shift: Tensor | None = None, residual: Tensor | None = None,
    with_stats: Literal[True], out: Tensor | None = None, out_stats: ChannelStats | None = None,
) -> tuple[Tensor, ChannelStats]: ...
# fmt: on
def conv2d_int8(
    x: Tensor,  # [N, C1, H, W] channels_last, a float type
    weight: Tensor,  # int8 [Cout, C, k, k] channels_last; with upsample quantised phase weights [4, Cout, C, 2, 2]
    weight_scale: Tensor,  # float32 [Cout], with upsample [4, Cout]
    activation: Tensor,  # float32 [1, 2] or [N, 2]: (step, zero point)
    bias: Tensor | None = None,  # [Cout]
    *,
    stride: int = 1,
    upsample: bool = False,
    skip: Tensor | None = None,  # [N, C2, H, W]: C = C1 + C2
    coefficients: Tensor | None = None,  # [N, 3, C] float32
    silu: bool = False,
    time_shift: Tensor | None = None,  # [N, Cout], dense rows
    residual: Tensor | None = None,  # [N, Cout, Ho, Wo]
    with_stats: bool = False,
    out: Tensor | None = None,  # [N, Cout, Ho, Wo]
    out_stats: ChannelStats | None = None,  # as made by conv2d_int8_stats
) -> Tensor | tuple[Tensor, ChannelStats]:
    """a = silu((cat(x, skip) - centre) * gain + offset); q = clamp(round(a / step + zero point), 0, 255);
    y = step * weight_scale * conv(q - zero point, weight) + bias + time_shift + residual.

    ``conv2d`` with 8-bit products: the integer sums are exact, and all else is as there (which also explains the
    options). ``weight`` and ``weight_scale`` come from ``quantise_weight``, ``activation`` from ``activation_scale``;
    the zero point is a whole number in 0..255. ``a`` is not rounded to x's dtype; where a / step lies within 1/20 of
    the middle between two integers, either may be taken. Integers have no NaN: one in ``x`` may come out as any number,
    in the positions that its window reaches. A 1x1 shortcut is a ``conv2d`` of its own, as ``residual``.

    Raises ``ContractError`` for arguments outside the contract and ``BackendError`` where no backend can run.
    Source: Jacob et al., "Quantization and training of neural networks for integer-arithmetic-only inference", 2018.
    """
    arguments, _ = _checked(
        x, weight, weight_scale, activation, bias, stride=stride, upsample=upsample, skip=skip,
        coefficients=coefficients, silu=silu, time_shift=time_shift, residual=residual, with_stats=with_stats, out=out,
        out_stats=out_stats,
    )  # fmt: skip
    computed: Any = OP.run(x.device, x.dtype, *arguments)
    return computed  # type: ignore[no-any-return]


def conv2d_int8_stats(x: Tensor, weight: Tensor, *tensors: Tensor, **options: Any) -> ChannelStats:
    """Room for the statistics of ``conv2d_int8`` with the same arguments, as ``conv2d_stats``."""
    arguments, shape = _checked(x, weight, *tensors, **options)
    return stats_room(NAME, None, shape, OP.pieces(x.device, x.dtype, *arguments), x)


def bind_conv2d_int8(x: Tensor, weight: Tensor, *tensors: Tensor, **options: Any) -> Callable[[], Any]:
    """``conv2d_int8`` of these very tensors, to be called many times, as ``bind_conv2d``."""
    arguments, _ = _checked(x, weight, *tensors, **options)
    check_bound(NAME, x, *arguments[-3:])
    return OP.bind(x.device, x.dtype, *arguments)


def _is_step(row: tuple[float, ...]) -> bool:
    step, zero = row
    return 1e-37 < step < 1e37 and 0 <= zero <= 255 and zero == int(zero)


_checked = Contract(
    NAME, torch.int8, 2, _is_step, ("a step above 0 and a whole zero point in 0..255", "(step, zero point)")
).checked


OP = Op(
    NAME,
    "conv2d with 8-bit integer products",
    [
        Backend("cpu", f"{__name__}.native:conv2d_int8", frozenset({"cpu"}), FLOATS),
        Backend("torch", f"{__name__}.torch_backend:conv2d_int8", frozenset({"cpu", "cuda"}), ANY_FLOAT),
        Backend("reference", f"{__name__}.reference:conv2d_int8", frozenset({"cpu", "cuda"}), ANY_FLOAT),
    ],
)
