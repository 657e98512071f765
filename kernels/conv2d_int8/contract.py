"""The checks of conv2d_int8 (and conv2d_fp8, which differs in types only), and the shape of the result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from idm_fast.kernels import check
from idm_fast.kernels.channel_stats import ChannelStats
from idm_fast.kernels.conv2d.contract import (
    Shape,
    check_image,
    check_parameter,
    check_weight,
    check_written,
    input_channels,
    output_shape,
)

# What every backend takes, in this order: the arguments of the public function.
Arguments = tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor | None, int, bool, Tensor | None, Tensor | None, bool, Tensor | None,
    Tensor | None, bool, Tensor | None, ChannelStats | None,
]  # fmt: skip
LONGEST_SUM = 66000  # products of 255 * 127 that int32 holds


@dataclass(frozen=True)
class Contract:
    """Of the operation ``op``: the type of its weight, and a row of ``activation``: how many numbers, which are allowed
    (``is_step``), and in words (contract, expected)."""

    op: str
    weight: torch.dtype
    columns: int
    is_step: Callable[[tuple[float, ...]], bool]
    words: tuple[str, str]

    def checked(
        self, x: Tensor, weight: Tensor, weight_scale: Tensor, activation: Tensor, bias: Tensor | None = None, *,
        stride: int = 1, upsample: bool = False, skip: Tensor | None = None, coefficients: Tensor | None = None,
        silu: bool = False, time_shift: Tensor | None = None, residual: Tensor | None = None,
        with_stats: bool = False, out: Tensor | None = None, out_stats: ChannelStats | None = None,
    ) -> tuple[Arguments, Shape]:  # fmt: skip
        """The options of the public function in the order of a backend, and the shape of the result."""
        arguments: Arguments = (
            x, weight, weight_scale, activation, bias, stride, upsample, skip, coefficients, silu, time_shift,
            residual, with_stats, out, out_stats,
        )  # fmt: skip
        shape = check_arguments(self.op, self.weight, self.columns, arguments)
        for row in activation.tolist() if activation.device.type == "cpu" else ():
            if not self.is_step(row):
                check.fail(self.op, "activation", *self.words, row[0] if len(row) == 1 else tuple(row))
        if x.shape[0] == 0:
            check.fail(self.op, "x", "of at least one sample", "N >= 1", list(x.shape))
        return arguments, shape


def check_arguments(op: str, weight_dtype: torch.dtype, columns: int, arguments: Arguments) -> Shape:
    """Raises ``ContractError`` for the first argument that breaks the contract; returns the shape of the result.

    ``columns``: numbers in a row of ``activation``.
    """
    (x, weight, weight_scale, activation, bias, stride, upsample, skip, coefficients, silu, time_shift, residual,
     with_stats, out, out_stats) = arguments  # fmt: skip
    read = {
        "x": x, "weight": weight, "weight_scale": weight_scale, "activation": activation, "bias": bias, "skip": skip,
        "coefficients": coefficients, "time_shift": time_shift, "residual": residual,
    }  # fmt: skip
    check.no_autograd(op, *read.values(), out)
    n, c = input_channels(op, x, skip)
    check_weight(op, weight, weight_dtype, x, c, stride, upsample)
    products = c * weight.shape[-1] * weight.shape[-2]
    if weight_dtype == torch.int8 and products > LONGEST_SUM:
        contract = "of so few products that their sum fits int32"
        check.fail(op, "weight", contract, f"k * k * C <= {LONGEST_SUM}", products)
    shape = output_shape(x, weight, stride, upsample)
    cout = shape[1]
    _floats(
        op, "weight_scale", weight_scale, x, "[4, Cout]" if upsample else "[Cout]", weight.shape[: weight.dim() - 3]
    )
    rows = n if activation.dim() == 2 and activation.shape[0] == n else 1
    _floats(op, "activation", activation, x, f"[1, {columns}] or [N, {columns}]", (rows, columns))
    if bias is not None:
        check_parameter(op, "bias", bias, x, "[Cout]", (cout,))
    if coefficients is not None:
        _floats(op, "coefficients", coefficients, x, "[N, 3, C]", (n, 3, c))
    elif silu:
        check.fail(op, "silu", "given with coefficients", "False without them", silu)
    if time_shift is not None:
        check_parameter(op, "time_shift", time_shift, x, "[N, Cout]", (n, cout))
    if residual is not None:
        check_image(op, "residual", residual, x, shape)
    check_written(op, x, shape, with_stats, out, out_stats, read)
    return shape


def _floats(op: str, name: str, value: Tensor, x: Tensor, contract: str, shape: tuple[int, ...]) -> None:
    check.shape_is(op, name, value, contract, shape)
    check.dtype_in(op, name, value, (torch.float32, *((torch.float64,) if x.dtype == torch.float64 else ())))
    check.device_is(op, name, value, x.device)
    if not value.is_contiguous():
        check.fail(op, name, "contiguous", "True", "False")
