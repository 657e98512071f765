"""The checks of sampler_update. All of them take 20 us; of arguments that look as before only a few are asked."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

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
    base: Tensor | None,
) -> None:
    """Raises ``ContractError`` for the first argument that breaks the contract."""
    check.no_autograd(NAME, x, model_output, history, table, network_input, threshold, base)
    prediction_is(NAME, x, model_output, table, step, unshuffle)
    check.shape_is(NAME, "history", history, "of x's shape", x.shape)
    check.dtype_in(NAME, "history", history, (torch.float32,))
    seeds_are(NAME, seeds, x.shape[0])
    others = {"history": history, "seeds": seeds}
    written = {"x": x, "history": history}
    read = {"model_output": model_output, "table": table, "seeds": seeds}
    if network_input is not None:
        check.floating(NAME, "network_input", network_input)
        _is_unshuffled(NAME, "network_input", network_input, x.shape, unshuffle)
        others["network_input"] = written["network_input"] = network_input
    elif unshuffle != 1 and model_output.shape == x.shape:
        contract = "the layout of a network_input or of model_output"
        check.fail(NAME, "unshuffle", contract, "1 without one of them", unshuffle)
    if base is not None:
        check.shape_is(NAME, "base", base, "of x's shape", x.shape)
        check.dtype_in(NAME, "base", base, (torch.float32,))
        others["base"] = read["base"] = base
    if threshold is not None:
        check.shape_is(NAME, "threshold", threshold, "[N]", x.shape[:1])
        check.dtype_in(NAME, "threshold", threshold, (torch.float32,))
        if not threshold.is_contiguous():
            check.fail(NAME, "threshold", "contiguous", "stride 1", f"stride {threshold.stride(0)}")
        others["threshold"] = read["threshold"] = threshold
    if isinstance(step, Tensor):
        read["step"] = step
    for name, tensor in others.items():
        check.device_is(NAME, name, tensor, x.device)
    check.all_apart(NAME, written, read)


def prediction_is(
    op: str, x: Tensor, model_output: Tensor, table: Tensor, step: int | Tensor, unshuffle: int = 1
) -> None:
    """The checks of what x0_hat is made of, for every operation that makes it."""
    if x.dim() != 4:
        check.fail(op, "x", "4-dimensional", "[N, C, H, W]", list(x.shape))
    check.dtype_in(op, "x", x, (torch.float32,))
    check.floating(op, "model_output", model_output)
    if model_output.shape != x.shape:
        _is_unshuffled(op, "model_output", model_output, x.shape, unshuffle)
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
    elif not check.is_index(step) or not 0 <= step < table.shape[0]:
        check.fail(op, "step", "a row of table", f"0 <= step < {table.shape[0]}", step)


def _is_unshuffled(op: str, name: str, tensor: Tensor, shape: torch.Size, unshuffle: int) -> None:
    n, c, h, w = shape
    if unshuffle < 1 or h % unshuffle or w % unshuffle:
        check.fail(op, "unshuffle", "a divisor of height and width", f"divisor of {h} and {w}", unshuffle)
    contract = "of x's shape" if unshuffle == 1 else "of pixel_unshuffle(x)'s shape"
    expected = (n, c * unshuffle**2, h // unshuffle, w // unshuffle)
    check.shape_is(op, name, tensor, contract, expected)


def position_stride(tensor: Tensor) -> int:
    """Elements from one position to the next where the channels of [N, C, H, W] are dense and the positions evenly

    spaced: C in a channels_last tensor, more in some channels of a wider one. 0 for any other layout.
    """
    n, c, h, w = tensor.shape
    of_n, of_c, of_h, of_w = tensor.stride()
    pitch = of_w if w > 1 else of_h if h > 1 else of_n if n > 1 else c
    even = (h == 1 or of_h == w * pitch) and (n == 1 or of_n == h * w * pitch)
    return pitch if even and pitch >= c and (c == 1 or of_c == 1) else 0


def facts(tensor: Tensor) -> tuple[object, ...]:
    """What of a tensor the checks ask, all but its address and whether it requires a gradient."""
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def wants_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def prepare(
    run: Callable[..., None],
    x: Tensor,
    model_output: Tensor,
    history: Tensor,
    table: Tensor,
    step: int | Tensor,
    seeds: Tensor,
    network_input: Tensor | None,
    threshold: Tensor | None,
    unshuffle: int,
    base: Tensor | None,
) -> Callable[..., bool]:
    """``run``, for arguments that look the same: it runs where addresses and step are in order, else it says False."""
    rows, counter = table.shape[0], step if isinstance(step, Tensor) else None
    given = (x, model_output, history, table, seeds, network_input, threshold, base, counter)
    reach = [_reach(tensor) for tensor in given if tensor is not None]

    def again(
        x: Tensor,
        model_output: Tensor,
        history: Tensor,
        table: Tensor,
        step: int | Tensor,
        seeds: Tensor,
        network_input: Tensor | None,
        threshold: Tensor | None,
        unshuffle: int,
        base: Tensor | None,
    ) -> bool:
        begins = [tensor.data_ptr() for tensor in (x, model_output, history, table, seeds)]
        begins += [tensor.data_ptr() for tensor in (network_input, threshold, base) if tensor is not None]
        if isinstance(step, Tensor):
            begins.append(step.data_ptr())
        elif not 0 <= step < rows:
            return False
        extents = sorted(zip(begins, reach, strict=True))
        for (begin, size), (following, _) in pairwise(extents):
            if begin + size > following:
                return False
        run(x, model_output, history, table, step, seeds, network_input, threshold, unshuffle, base)
        return True

    return again


def _reach(tensor: Tensor) -> int:
    begin, end = check.extent(tensor)
    return end - begin
