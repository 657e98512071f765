"""The checks of conv2d_int8 (and conv2d_fp8, which differs in types only), and the shape of the result."""

from __future__ import annotations

import torch
from torch import Tensor

from idm_fast.kernels import check
from idm_fast.kernels.conv2d.contract import Shape, output_shape

# What every backend takes, in this order: the arguments of the public function.
Arguments = tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor | None, int, bool, Tensor | None, Tensor | None, bool, Tensor | None,
    Tensor | None, bool, Tensor | None,
]  # fmt: skip
LONGEST_SUM = 66000  # products of 255 * 127 that int32 holds


def check_arguments(op: str, weight_dtype: torch.dtype, columns: int, arguments: Arguments) -> Shape:
    """Raises ``ContractError`` for the first argument that breaks the contract; returns the shape of the result.

    ``columns``: numbers in a row of ``activation``.
    """
    (x, weight, weight_scale, activation, bias, stride, upsample, skip, coefficients, silu, time_shift, residual,
     _, out) = arguments  # fmt: skip
    read = {
        "x": x, "weight": weight, "weight_scale": weight_scale, "activation": activation, "bias": bias, "skip": skip,
        "coefficients": coefficients, "time_shift": time_shift, "residual": residual,
    }  # fmt: skip
    check.no_autograd(op, *read.values(), out)
    if x.dim() != 4:
        check.fail(op, "x", "4-dimensional", "[N, C1, H, W]", list(x.shape))
    check.floating(op, "x", x)
    check.nhwc(op, "x", x)
    n, c, h, w = x.shape
    if 0 in (c, h, w):
        check.fail(op, "x", "of at least one channel and position", "C1, H, W >= 1", list(x.shape))
    if skip is not None:
        _image(op, "skip", skip, x, (n, -1, h, w))
        c += skip.shape[1]
    _weight(op, weight, weight_dtype, x, c, stride, upsample)
    shape = output_shape(x, weight, stride, upsample)
    cout = shape[1]
    _floats(
        op, "weight_scale", weight_scale, x, "[4, Cout]" if upsample else "[Cout]", weight.shape[: weight.dim() - 3]
    )
    rows = n if activation.dim() == 2 and activation.shape[0] == n else 1
    _floats(op, "activation", activation, x, f"[1, {columns}] or [N, {columns}]", (rows, columns))
    if bias is not None:
        _parameter(op, "bias", bias, x, "[Cout]", (cout,))
    if coefficients is not None:
        _floats(op, "coefficients", coefficients, x, "[N, 3, C]", (n, 3, c))
    elif silu:
        check.fail(op, "silu", "given with coefficients", "False without them", silu)
    if time_shift is not None:
        _parameter(op, "time_shift", time_shift, x, "[N, Cout]", (n, cout))
    if residual is not None:
        _image(op, "residual", residual, x, shape)
    if out is not None:
        _image(op, "out", out, x, shape)
        check.all_apart(op, {"out": out}, {name: tensor for name, tensor in read.items() if tensor is not None})
    return shape


def _weight(op: str, weight: Tensor, dtype: torch.dtype, x: Tensor, c: int, stride: int, upsample: bool) -> None:
    check.dtype_in(op, "weight", weight, (dtype,))
    check.device_is(op, "weight", weight, x.device)
    if upsample:
        if stride != 1:
            check.fail(op, "stride", "1 with upsample", 1, stride)
        if weight.dim() != 5:
            check.fail(op, "weight", "quantised phase weights", "[4, Cout, C, 2, 2]", list(weight.shape))
        check.shape_is(op, "weight", weight, "[4, Cout, C, 2, 2]", (4, weight.shape[1], c, 2, 2))
        if not weight.permute(0, 1, 3, 4, 2).is_contiguous():
            check.fail(op, "weight", "in the order [4][Cout][2][2][C]", "dense", f"strides {list(weight.stride())}")
        cout, taps = weight.shape[1], 4
    else:
        if weight.dim() != 4:
            check.fail(op, "weight", "4-dimensional", "[Cout, C, k, k]", list(weight.shape))
        cout, k = weight.shape[0], weight.shape[3]
        if k not in (1, 3):
            check.fail(op, "weight", "of kernel size", "1 or 3", k)
        check.shape_is(op, "weight", weight, "[Cout, C, k, k]", (cout, c, k, k))
        check.nhwc(op, "weight", weight)
        if stride not in ((1,) if k == 1 else (1, 2)):
            check.fail(op, "stride", f"allowed for k = {k}", "1" if k == 1 else "1 or 2", stride)
        taps = k * k
    if cout == 0:
        check.fail(op, "weight", "of at least one output channel", "Cout >= 1", 0)
    if dtype == torch.int8 and taps * c > LONGEST_SUM:
        check.fail(
            op, "weight", "of so few products that their sum fits int32", f"k * k * C <= {LONGEST_SUM}", taps * c
        )


def _image(op: str, name: str, image: Tensor, x: Tensor, shape: Shape) -> None:
    """An NHWC image of x's dtype and device; -1: any number of channels above zero."""
    n, c, h, w = shape
    if image.dim() != 4 or image.shape[1] == 0:
        check.fail(op, name, "4-dimensional with channels", [n, "C" if c < 0 else c, h, w], list(image.shape))
    check.shape_is(op, name, image, "[N, C, H, W]", (n, image.shape[1] if c < 0 else c, h, w))
    check.dtype_in(op, name, image, (x.dtype,))
    check.device_is(op, name, image, x.device)
    check.nhwc(op, name, image)


def _parameter(op: str, name: str, value: Tensor, x: Tensor, contract: str, shape: tuple[int, ...]) -> None:
    check.shape_is(op, name, value, contract, shape)
    check.dtype_in(op, name, value, (torch.float32, x.dtype))
    check.device_is(op, name, value, x.device)
    check.last_dim_dense(op, name, value)


def _floats(op: str, name: str, value: Tensor, x: Tensor, contract: str, shape: tuple[int, ...]) -> None:
    check.shape_is(op, name, value, contract, shape)
    check.dtype_in(op, name, value, (torch.float32, *((torch.float64,) if x.dtype == torch.float64 else ())))
    check.device_is(op, name, value, x.device)
    if not value.is_contiguous():
        check.fail(op, name, "contiguous", "True", "False")
