"""One step of any sampler of the form x = a x + b x0_hat + c x0_hat_previous + s noise."""

from __future__ import annotations

from torch import Tensor

from idm_fast.kernels import check
from idm_fast.kernels.dispatch import FLOATS, Backend, Op, forced_backends
from idm_fast.kernels.interpreter import second_axis, triton_condition
from idm_fast.kernels.sampler_update import contract

NAME = contract.NAME
COLUMNS = ("k_x", "k_out", "a", "b", "c", "s", "clamp", "reserved")


def sampler_update(
    x: Tensor,  # [N, C, H, W] float32, updated in place
    model_output: Tensor,  # [N, C, H, W], or [N, C f^2, H / f, W / f]
    history: Tensor,  # [N, C, H, W] float32, overwritten with x0_hat
    table: Tensor,  # [T, 8] float32, columns as in COLUMNS
    step: int | Tensor,  # a Tensor: int64, one element, on x's device
    seeds: Tensor,  # [N] int64
    *,
    network_input: Tensor | None = None,  # [N, C f^2, H / f, W / f] any float dtype, receives a cast of the new x
    threshold: Tensor | None = None,  # [N] float32, > 0
    unshuffle: int = 1,  # f
    base: Tensor | None = None,  # [N, C, H, W] float32
) -> None:
    """x0_hat = clamp(k_x x + k_out (model_output + base), +-clamp);  x = a x + b x0_hat + c history + s noise.

    Then history = x0_hat and network_input = pixel_unshuffle(x, f). The coefficients are row ``step`` of ``table``.
    clamp <= 0 means no clamp. Where c == 0 the history is not read, so it may hold anything at the first step. Where
    s == 0 no noise is drawn. The noise is counter-based: key = the image's own seed, counter = (element // 4,
    step + 1), with elements counted in NHWC order within one image; a batch equals its singles, and every backend,
    device and memory layout draws the same noise (see kernels/philox_normal).

    ``step`` as a tensor is a counter on the device, for a captured graph: it is never read on the host, so a value
    outside the table cannot be refused; it counts as the nearest row. ``threshold`` t (``dynamic_threshold`` makes it)
    replaces the clamp: x0_hat = clamp(..., +-t) / t, per image. ``network_input`` may be some channels of a wider
    channels_last tensor, beside the condition's: with f > 1 the slice that pixel_unshuffle of the concatenation has.
    ``model_output`` may come as such a network stores it, pixel_unshuffle(output, f). ``base`` is the condition of a
    residual network: added in float32, so that it is not rounded to the network's dtype.

    The fast backends take channels_last tensors; any other dense layout runs on ``torch``.

    Raises ``ContractError`` for arguments outside the contract and ``BackendError`` where no backend can run.
    Source of the threshold: Imagen, arXiv 2205.11487, section 2.3.
    """
    key = (
        *(x.shape, x.stride(), x.dtype, x.device),
        *(model_output.shape, model_output.stride(), model_output.dtype, model_output.device),
        *(history.shape, history.stride(), history.dtype, history.device),
        *(table.shape, table.stride(), table.dtype, table.device),
        *(seeds.shape, seeds.stride(), seeds.dtype, seeds.device),
        None if network_input is None else contract.facts(network_input),
        None if threshold is None else contract.facts(threshold),
        contract.facts(step) if isinstance(step, Tensor) else None,
        None if base is None else contract.facts(base),
        unshuffle,
        forced_backends(),
    )
    again = OP.prepared(key)
    arguments = (x, model_output, history, table, step, seeds, network_input, threshold, unshuffle, base)
    tensors = (x, model_output, history, table, network_input, threshold, base)
    if again is not None and not contract.wants_grad(*tensors) and again(*arguments):
        return
    contract.check_all(*arguments)
    if x.numel() == 0:
        return
    run = OP.choose(x.device, model_output.dtype, *arguments)
    run(*arguments)
    # What is remembered runs if also the rest is in order (addresses, the step), and says whether it has.
    OP.remember(key, getattr(run, "prepare", contract.prepare)(run, *arguments))


def _nhwc_only(
    x: Tensor,
    model_output: Tensor,
    history: Tensor,
    table: Tensor,
    step: int | Tensor,
    seeds: Tensor,
    network_input: Tensor | None = None,
    threshold: Tensor | None = None,
    unshuffle: int = 1,
    base: Tensor | None = None,
) -> str | None:
    images = (("x", x), ("model_output", model_output), ("history", history), ("base", base))
    for name, tensor in images:
        if tensor is not None and not check.is_nhwc(tensor):
            return f"takes channels_last tensors, {name} is not"
    if network_input is not None:
        if not contract.position_stride(network_input):
            return "takes channels_last tensors or channels of one, network_input is neither"
        if network_input.dtype not in FLOATS:
            return f"writes float32, bfloat16 or float16, not {network_input.dtype}"
    return None


OP = Op(
    NAME,
    "x = a x + b clamp(k_x x + k_out (model_output + base)) + c history + s noise",
    [
        Backend(
            "triton",
            f"{__name__}.triton_kernel:sampler_update",
            frozenset({"cuda", "cpu"}),
            FLOATS,
            min_capability=(8, 0),
            limits=lambda x, *rest: second_axis(x) or _nhwc_only(x, *rest),
            condition=triton_condition,
        ),
        Backend(
            "cuda",
            f"{__name__}.cuda:sampler_update",
            frozenset({"cuda"}),
            FLOATS,
            min_capability=(8, 0),
            limits=_nhwc_only,
        ),
        Backend("cpu", f"{__name__}.native:sampler_update", frozenset({"cpu"}), FLOATS, limits=_nhwc_only),
        Backend("torch", f"{__name__}.torch_backend:sampler_update", frozenset({"cpu", "cuda"}), FLOATS),
        Backend("reference", f"{__name__}.reference:sampler_update", frozenset({"cpu", "cuda"}), FLOATS),
    ],
)
