"""One step of any sampler of the form x = a x + b x0_hat + c x0_hat_previous + s noise."""

from __future__ import annotations

import torch
from torch import Tensor

from idm_fast.kernels import check, extension
from idm_fast.kernels.dispatch import FLOATS, Backend, Op, forced_backends
from idm_fast.kernels.interpreter import triton_condition
from idm_fast.kernels.sampler_update.reference import philox_normal as _reference_normal

NAME = "sampler_update"
COLUMNS = ("k_x", "k_out", "a", "b", "c", "s", "clamp", "reserved")


def sampler_update(
    x: Tensor,  # [N, C, H, W] float32, updated in place
    model_output: Tensor,  # [N, C, H, W]
    history: Tensor,  # [N, C, H, W] float32, overwritten with x0_hat
    table: Tensor,  # [T, 8] float32, columns as in COLUMNS
    step: int,
    seeds: Tensor,  # [N] int64
    *,
    network_input: Tensor | None = None,  # [N, C, H, W] any float dtype, receives a cast of the new x
) -> None:
    """x0_hat = clamp(k_x x + k_out model_output, +-clamp);  x = a x + b x0_hat + c history + s noise.

    Then history = x0_hat and network_input = x. The coefficients are row ``step`` of ``table``. clamp <= 0 means no
    clamp. Where c == 0 the history is not read, so it may hold anything at the first step. Where s == 0 no noise is
    drawn. The noise is counter-based: key = the image's own seed, counter = (element // 4, step + 1), with elements
    counted in NHWC order within one image; a batch equals its singles, and every backend, device and memory layout
    draws the same noise (see reference.py).

    The fast backends take channels_last tensors; any other dense layout runs on ``torch``.

    Raises ``ContractError`` for arguments outside the contract and ``BackendError`` where no backend can run.
    """
    check.no_autograd(NAME, x, model_output, history, table, network_input)
    if x.dim() != 4:
        check.fail(NAME, "x", "4-dimensional", "[N, C, H, W]", list(x.shape))
    check.dtype_in(NAME, "x", x, (torch.float32,))
    check.floating(NAME, "model_output", model_output)
    check.shape_is(NAME, "model_output", model_output, "of x's shape", x.shape)
    check.shape_is(NAME, "history", history, "of x's shape", x.shape)
    check.dtype_in(NAME, "history", history, (torch.float32,))
    check.dtype_in(NAME, "table", table, (torch.float32,))
    if table.dim() != 2 or table.shape[1] != len(COLUMNS) or not table.is_contiguous():
        check.fail(NAME, "table", "contiguous", "[T, 8]", list(table.shape))
    if not 0 <= step < table.shape[0]:
        check.fail(NAME, "step", "a row of table", f"0 <= step < {table.shape[0]}", step)
    _check_seeds(NAME, seeds, x.shape[0])
    for name, tensor in (("model_output", model_output), ("history", history), ("table", table), ("seeds", seeds)):
        check.device_is(NAME, name, tensor, x.device)
    written = {"x": x, "history": history}
    if network_input is not None:
        check.floating(NAME, "network_input", network_input)
        check.shape_is(NAME, "network_input", network_input, "of x's shape", x.shape)
        check.device_is(NAME, "network_input", network_input, x.device)
        written["network_input"] = network_input
    check.all_apart(NAME, written, {"model_output": model_output})
    if x.numel():
        OP.run(x.device, model_output.dtype, x, model_output, history, table, step, seeds, network_input)


def philox_normal(
    seeds: Tensor,  # [N] int64
    shape: tuple[int, int, int, int],  # N, C, H, W
    step: int = -1,
    device: torch.device | str | None = None,
) -> Tensor:
    """The standard normal noise of ``step`` (-1: the initial noise of a chain): float32 [N, C, H, W] channels_last.

    The numbers depend on the seed, the step and the element's place in NHWC order alone, not on batch, device or
    backend (up to float32 rounding). Raises ``ContractError`` for arguments outside the contract.
    """
    op = "philox_normal"
    if len(shape) != 4 or min(shape) < 0:
        check.fail(op, "shape", "4 sizes", "(N, C, H, W)", tuple(shape))
    _check_seeds(op, seeds, shape[0])
    if not -1 <= step < 2**32 - 1:
        check.fail(op, "step", "a 32-bit counter", "-1 <= step < 2**32 - 1", step)
    place = torch.device(device) if device is not None else seeds.device
    seeds = seeds.to(place)
    forced = forced_backends()
    if place.type == "cpu" and extension.native is not None and (not forced or "cpu" in forced):
        # The defaults that a user may have set (torch.set_default_dtype, set_default_device) must not come in here.
        out = torch.empty(shape, dtype=torch.float32, device=place, memory_format=torch.channels_last)
        extension.native.philox_normal(extension.view(out), extension.view(seeds), step, torch.get_num_threads())
        return out
    return _reference_normal(seeds, shape, step)


def _check_seeds(op: str, seeds: Tensor, n: int) -> None:
    check.dtype_in(op, "seeds", seeds, (torch.int64,))
    check.shape_is(op, "seeds", seeds, "[N]", (n,))
    if not seeds.is_contiguous():
        check.fail(op, "seeds", "contiguous", "stride 1", f"stride {seeds.stride(0)}")


def _nhwc_only(
    x: Tensor,
    model_output: Tensor,
    history: Tensor,
    table: Tensor,
    step: int,
    seeds: Tensor,
    network_input: Tensor | None,
) -> str | None:
    for name, tensor in (("x", x), ("model_output", model_output), ("history", history)):
        if not check.is_nhwc(tensor):
            return f"takes channels_last tensors, {name} is not"
    if network_input is not None:
        if not check.is_nhwc(network_input):
            return "takes channels_last tensors, network_input is not"
        if network_input.dtype not in FLOATS:
            return f"writes float32, bfloat16 or float16, not {network_input.dtype}"
    return None


OP = Op(
    NAME,
    "x = a x + b clamp(k_x x + k_out model_output) + c history + s noise",
    [
        Backend(
            "triton",
            f"{__name__}.triton_kernel:sampler_update",
            frozenset({"cuda", "cpu"}),
            FLOATS,
            min_capability=(8, 0),
            limits=_nhwc_only,
            condition=triton_condition,
        ),
        Backend("cpu", f"{__name__}.native:sampler_update", frozenset({"cpu"}), FLOATS, limits=_nhwc_only),
        Backend("torch", f"{__name__}.torch_backend:sampler_update", frozenset({"cpu", "cuda"}), FLOATS),
        Backend("reference", f"{__name__}.reference:sampler_update", frozenset({"cpu", "cuda"}), FLOATS),
    ],
)
