"""The checks of conv2d (in parts also of its quantised versions), and the shapes of what it writes."""

from __future__ import annotations

import torch
from torch import Tensor

from idm_fast.kernels import check
from idm_fast.kernels.channel_stats import ChannelStats

NAME = "conv2d"

# What every backend takes, in this order: the arguments of ``conv2d``.
Arguments = tuple[
    Tensor, Tensor, Tensor | None, int, bool, Tensor | None, Tensor | None, bool, Tensor | None, Tensor | None,
    Tensor | None, Tensor | None, Tensor | None, bool, Tensor | None, ChannelStats | None,
]  # fmt: skip
Shape = tuple[int, int, int, int]


def output_shape(x: Tensor, weight: Tensor, stride: int, upsample: bool) -> Shape:
    """[N, Cout, Ho, Wo] of a call that was checked."""
    n, _, h, w = x.shape
    if upsample:
        return n, weight.shape[1], 2 * h, 2 * w
    return n, weight.shape[0], (h - 1) // stride + 1, (w - 1) // stride + 1


def check_arguments(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    upsample: bool,
    skip: Tensor | None,
    coefficients: Tensor | None,
    silu: bool,
    shortcut: Tensor | None,
    shortcut_skip: Tensor | None,
    shortcut_weight: Tensor | None,
    time_shift: Tensor | None,
    residual: Tensor | None,
    with_stats: bool,
    out: Tensor | None,
    out_stats: ChannelStats | None,
) -> Shape:
    """Raises ``ContractError`` for the first argument that breaks the contract; returns the shape of the result."""
    read = {
        "x": x, "weight": weight, "bias": bias, "skip": skip, "coefficients": coefficients, "shortcut": shortcut,
        "shortcut_skip": shortcut_skip, "shortcut_weight": shortcut_weight, "time_shift": time_shift,
        "residual": residual,
    }  # fmt: skip
    check.no_autograd(NAME, *read.values(), out)
    n, c = input_channels(NAME, x, skip)
    check_weight(NAME, weight, x.dtype, x, c, stride, upsample)
    shape = output_shape(x, weight, stride, upsample)
    cout = shape[1]
    if bias is not None:
        check_parameter(NAME, "bias", bias, x, "[Cout]", (cout,))
    if coefficients is not None:
        check.shape_is(NAME, "coefficients", coefficients, "[N, 3, C]", (n, 3, c))
        check.dtype_in(NAME, "coefficients", coefficients, (torch.float32, *_double(x)))
        check.device_is(NAME, "coefficients", coefficients, x.device)
        if not coefficients.is_contiguous():
            check.fail(NAME, "coefficients", "contiguous", "True", "False")
    elif silu:
        check.fail(NAME, "silu", "given with coefficients", "False without them", silu)
    _shortcut(x, shape, shortcut, shortcut_skip, shortcut_weight)
    if time_shift is not None:
        check_parameter(NAME, "time_shift", time_shift, x, "[N, Cout]", (n, cout))
    if residual is not None:
        check_image(NAME, "residual", residual, x, shape)
    check_written(NAME, x, shape, with_stats, out, out_stats, read)
    return shape


def input_channels(op: str, x: Tensor, skip: Tensor | None) -> tuple[int, int]:
    """(N, C) of x and skip, checked."""
    if x.dim() != 4:
        check.fail(op, "x", "4-dimensional", "[N, C1, H, W]", list(x.shape))
    check.floating(op, "x", x)
    check.nhwc(op, "x", x)
    n, c, h, w = x.shape
    if 0 in (c, h, w):
        check.fail(op, "x", "of at least one channel and position", "C1, H, W >= 1", list(x.shape))
    if skip is not None:
        check_image(op, "skip", skip, x, (n, -1, h, w))
        c += skip.shape[1]
    return n, c


def check_weight(op: str, weight: Tensor, dtype: torch.dtype, x: Tensor, c: int, stride: int, upsample: bool) -> None:
    check.dtype_in(op, "weight", weight, (dtype,))
    check.device_is(op, "weight", weight, x.device)
    if upsample:
        if stride != 1:
            check.fail(op, "stride", "1 with upsample", 1, stride)
        if weight.dim() != 5:
            contract = "the phase weights of phase_weights(weight)"
            check.fail(op, "weight", contract, "[4, Cout, C, 2, 2]", list(weight.shape))
        cout = weight.shape[1]
        check.shape_is(op, "weight", weight, "[4, Cout, C, 2, 2]", (4, cout, c, 2, 2))
        if not weight.permute(0, 1, 3, 4, 2).is_contiguous():
            expected = f"strides {[4 * cout * c, 4 * c, 1, 2 * c, c]}"
            check.fail(op, "weight", "in the order [4][Cout][2][2][C]", expected, f"strides {list(weight.stride())}")
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
    if cout == 0:
        check.fail(op, "weight", "of at least one output channel", "Cout >= 1", 0)


def _shortcut(
    x: Tensor, shape: Shape, shortcut: Tensor | None, shortcut_skip: Tensor | None, weight: Tensor | None
) -> None:
    if (shortcut is None) != (weight is None):
        check.fail(NAME, "shortcut and shortcut_weight", "given together", "both or none", "one of them")
    if shortcut is None or weight is None:
        if shortcut_skip is not None:
            check.fail(NAME, "shortcut_skip", "given with shortcut", "None without it", list(shortcut_skip.shape))
        return
    n, cout, h, w = shape
    check_image(NAME, "shortcut", shortcut, x, (n, -1, h, w))
    channels = shortcut.shape[1]
    if shortcut_skip is not None:
        check_image(NAME, "shortcut_skip", shortcut_skip, x, (n, -1, h, w))
        channels += shortcut_skip.shape[1]
    check.shape_is(NAME, "shortcut_weight", weight, "[Cout, Cs]", (cout, channels))
    check.dtype_in(NAME, "shortcut_weight", weight, (x.dtype,))
    check.device_is(NAME, "shortcut_weight", weight, x.device)
    if not weight.is_contiguous():
        check.fail(NAME, "shortcut_weight", "contiguous", "True", "False")


def check_image(op: str, name: str, image: Tensor, x: Tensor, shape: Shape) -> None:
    """An NHWC image of x's dtype and device; -1: any number of channels above zero."""
    n, c, h, w = shape
    if image.dim() != 4 or image.shape[1] == 0:
        check.fail(op, name, "4-dimensional with channels", [n, "C" if c < 0 else c, h, w], list(image.shape))
    check.shape_is(op, name, image, "[N, C, H, W]", (n, image.shape[1] if c < 0 else c, h, w))
    check.dtype_in(op, name, image, (x.dtype,))
    check.device_is(op, name, image, x.device)
    check.nhwc(op, name, image)


def check_parameter(op: str, name: str, value: Tensor, x: Tensor, contract: str, shape: tuple[int, ...]) -> None:
    check.shape_is(op, name, value, contract, shape)
    check.dtype_in(op, name, value, (torch.float32, x.dtype))
    check.device_is(op, name, value, x.device)
    check.last_dim_dense(op, name, value)


def check_written(
    op: str,
    x: Tensor,
    shape: Shape,
    with_stats: bool,
    out: Tensor | None,
    out_stats: ChannelStats | None,
    read: dict[str, Tensor | None],
) -> None:
    """What is written has the shape of the result, and no memory in common with what is read or with each other."""
    written: dict[str, Tensor] = {}
    if out is not None:
        check_image(op, "out", out, x, shape)
        written["out"] = out
    if out_stats is not None:
        if not with_stats:
            check.fail(op, "out_stats", "given with with_stats", "None without it", "ChannelStats")
        if not isinstance(out_stats, ChannelStats):
            check.fail(op, "out_stats", f"what {op}_stats returns", "ChannelStats", type(out_stats).__name__)
        partials, counts = out_stats
        pieces = partials.shape[1] if partials.dim() == 4 else -1
        check.shape_is(op, "out_stats.partials", partials, "[N, P, 2, Cout]", (shape[0], pieces, 2, shape[1]))
        check.shape_is(op, "out_stats.counts", counts, "[P]", (pieces,))
        for name, tensor in (("out_stats.partials", partials), ("out_stats.counts", counts)):
            check.dtype_in(op, name, tensor, (torch.promote_types(x.dtype, torch.float32),))
            check.device_is(op, name, tensor, x.device)
            if not tensor.is_contiguous():
                check.fail(op, name, "contiguous", "True", "False")
            written[name] = tensor
    if written:
        check.all_apart(op, written, {name: tensor for name, tensor in read.items() if tensor is not None})


def stats_room(op: str, out_stats: ChannelStats | None, shape: Shape, pieces: int, x: Tensor) -> ChannelStats:
    """``out_stats``, whose number of pieces is checked, or new room for that many. Called by a backend first of all."""
    if out_stats is not None:
        check.shape_is(op, "out_stats.counts", out_stats.counts, "[P] of this backend and shape", (pieces,))
        return out_stats
    n, cout, _, _ = shape
    work = torch.promote_types(x.dtype, torch.float32)
    partials = torch.empty((n, pieces, 2, cout), dtype=work, device=x.device)
    return ChannelStats(partials, torch.empty((pieces,), dtype=work, device=x.device))


MOST_POSITIONS = 2**31 - 2**12  # the last tile of 32-bit positions must not wrap around to negative ones


def position_limit(x: Tensor, weight: Tensor, stride: int, upsample: bool) -> str | None:
    """Why a GPU cannot count the positions, or None: inside a sample they have 32 bits, offsets of elements 64."""
    _, _, ho, wo = output_shape(x, weight, stride, upsample)
    if max(ho * wo, x.shape[2] * x.shape[3]) > MOST_POSITIONS:
        return f"takes up to {MOST_POSITIONS} positions a sample"
    return None


def check_bound(op: str, x: Tensor, with_stats: bool, out: Tensor | None, out_stats: ChannelStats | None) -> None:
    """What a bound call asks beyond an ordinary one."""
    if x.shape[0] == 0:
        check.fail(op, "x", "of at least one sample", "N >= 1", list(x.shape))
    if out is None or (with_stats and out_stats is None):
        check.fail(op, "out" if out is None else "out_stats", "given to a bound call", "a tensor to write to", None)


def _double(x: Tensor) -> tuple[torch.dtype, ...]:
    return (torch.float64,) if x.dtype == torch.float64 else ()
