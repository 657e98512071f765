"""The checks of sampler_update. The whole takes 20 us; what can be asked again in one is ``still_holds``."""

from __future__ import annotations

import torch
from torch import Tensor

from idm_fast.kernels import check
from idm_fast.kernels.philox_normal import seeds_are

NAME = "sampler_update"
TABLE_COLUMNS = 8


def check_all(
    x: Tensor,
    model_output: Tensor,
    history: Tensor,
    table: Tensor,
    step: int | Tensor,
    seeds: Tensor,
    network_input: Tensor | None,
    threshold: Tensor | None,
    unshuffle: int,
) -> None:
    """Raises ``ContractError`` for the first argument that breaks the contract."""
    check.no_autograd(NAME, x, model_output, history, table, network_input, threshold)
    prediction_is(NAME, x, model_output, table, step)
    check.shape_is(NAME, "history", history, "of x's shape", x.shape)
    check.dtype_in(NAME, "history", history, (torch.float32,))
    seeds_are(NAME, seeds, x.shape[0])
    others = {"history": history, "seeds": seeds}
    written = {"x": x, "history": history}
    read = {"model_output": model_output}
    if network_input is not None:
        check.floating(NAME, "network_input", network_input)
        _layout_is(x.shape, network_input, unshuffle)
        others["network_input"] = written["network_input"] = network_input
    elif unshuffle != 1:
        check.fail(NAME, "unshuffle", "the layout of a network_input", "1 without one", unshuffle)
    if threshold is not None:
        check.shape_is(NAME, "threshold", threshold, "[N]", x.shape[:1])
        check.dtype_in(NAME, "threshold", threshold, (torch.float32,))
        if not threshold.is_contiguous():
            check.fail(NAME, "threshold", "contiguous", "stride 1", f"stride {threshold.stride(0)}")
        others["threshold"] = threshold
    for name, tensor in others.items():
        check.device_is(NAME, name, tensor, x.device)
    check.all_apart(NAME, written, read)


def prediction_is(op: str, x: Tensor, model_output: Tensor, table: Tensor, step: int | Tensor) -> None:
    """The checks of what x0_hat is made of, for every operation that makes it."""
    if x.dim() != 4:
        check.fail(op, "x", "4-dimensional", "[N, C, H, W]", list(x.shape))
    check.dtype_in(op, "x", x, (torch.float32,))
    check.floating(op, "model_output", model_output)
    check.shape_is(op, "model_output", model_output, "of x's shape", x.shape)
    check.dtype_in(op, "table", table, (torch.float32,))
    if table.dim() != 2 or 0 in table.shape or table.shape[1] != TABLE_COLUMNS or not table.is_contiguous():
        check.fail(op, "table", "contiguous", f"[T, {TABLE_COLUMNS}]", list(table.shape))
    check.device_is(op, "model_output", model_output, x.device)
    check.device_is(op, "table", table, x.device)
    if isinstance(step, Tensor):
        check.dtype_in(op, "step", step, (torch.int64,))
        if step.numel() != 1:
            check.fail(op, "step", "one element", "[] or [1]", list(step.shape))
        check.device_is(op, "step", step, x.device)
    elif not 0 <= step < table.shape[0]:
        check.fail(op, "step", "a row of table", f"0 <= step < {table.shape[0]}", step)


def _layout_is(shape: torch.Size, network_input: Tensor, unshuffle: int) -> None:
    n, c, h, w = shape
    if unshuffle < 1 or h % unshuffle or w % unshuffle:
        check.fail(NAME, "unshuffle", "a divisor of height and width", f"divisor of {h} and {w}", unshuffle)
    contract = "of x's shape" if unshuffle == 1 else "of pixel_unshuffle(x)'s shape"
    expected = (n, c * unshuffle**2, h // unshuffle, w // unshuffle)
    check.shape_is(NAME, "network_input", network_input, contract, expected)


def position_stride(tensor: Tensor) -> int:
    """Elements from one position to the next where the channels of [N, C, H, W] are dense and the positions evenly

    spaced: C in a channels_last tensor, more in some channels of a wider one. 0 for any other layout.
    """
    n, c, h, w = tensor.shape
    of_n, of_c, of_h, of_w = tensor.stride()
    pitch = of_w if w > 1 else of_h if h > 1 else of_n if n > 1 else c
    even = (h == 1 or of_h == w * pitch) and (n == 1 or of_n == h * w * pitch)
    return pitch if even and pitch >= c and (c == 1 or of_c == 1) else 0


def facts(tensor: Tensor | None) -> tuple[object, ...] | None:
    """What of a tensor the checks ask, all but its address and whether it requires a gradient."""
    return None if tensor is None else (tensor.shape, tensor.stride(), tensor.dtype, tensor.device)


def spans(x: Tensor, model_output: Tensor, history: Tensor, network_input: Tensor | None) -> tuple[int, ...]:
    """The bytes that each reaches over."""
    given = (x, model_output, history) if network_input is None else (x, model_output, history, network_input)
    return tuple(end - begin for begin, end in map(check.extent, given))


def still_holds(
    sizes: tuple[int, ...],
    x: Tensor,
    model_output: Tensor,
    history: Tensor,
    table: Tensor,
    step: int | Tensor,
    network_input: Tensor | None,
) -> bool:
    """Whether what shapes, layouts and types do not say is in order too; ``sizes`` are the ``spans``."""
    if torch.is_grad_enabled() and (x.requires_grad or model_output.requires_grad or history.requires_grad):
        return False
    if torch.is_grad_enabled() and (table.requires_grad or (network_input is not None and network_input.requires_grad)):
        return False
    if not (isinstance(step, Tensor) or 0 <= step < table.shape[0]):
        return False
    at_x, at_out, at_history = x.data_ptr(), model_output.data_ptr(), history.data_ptr()
    end_x, end_out, end_history = at_x + sizes[0], at_out + sizes[1], at_history + sizes[2]
    if (
        (at_x < end_out and at_out < end_x)
        or (at_x < end_history and at_history < end_x)
        or (at_out < end_history and at_history < end_out)
    ):
        return False
    if network_input is None:
        return True
    at = network_input.data_ptr()
    end = at + sizes[3]
    return not (
        (at < end_x and at_x < end) or (at < end_out and at_out < end) or (at < end_history and at_history < end)
    )
