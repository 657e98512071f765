"""The limit of Imagen's dynamic thresholding, one a sample, for ``sampler_update``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from idm_fast.kernels import check
from idm_fast.kernels.dispatch import FLOATS, Backend, Op
from idm_fast.kernels.interpreter import triton_condition
from idm_fast.kernels.sampler_update.contract import prediction_is

NAME = "dynamic_threshold"
MOST_ELEMENTS = 2**30  # of a sample that one Triton program counts in 32 bits


def dynamic_threshold(
    x: Tensor,  # [N, C, H, W] float32
    model_output: Tensor,  # [N, C, H, W]
    table: Tensor,  # [T, 8] float32, that of sampler_update
    step: int | Tensor,  # a Tensor: int64, one element, on x's device
    quantile: float,
    out: Tensor | None = None,  # [N] float32
) -> Tensor:
    """s = max(1, quantile of |x0_hat| over a sample), x0_hat = k_x x + k_out model_output: float32 [N].

    ``quantile`` lies in [0, 1] and is interpolated linearly between two order statistics, which are exact, as
    torch.quantile does (its limit of 2^24 elements does not hold here). ``step`` as in ``sampler_update``: a counter on
    the device outside the table is the nearest row. A NaN in a sample makes its threshold NaN, and so its update.

    Raises ``ContractError`` for arguments outside the contract and ``BackendError`` where no backend can run.
    Source: Imagen, arXiv 2205.11487, section 2.3 (there the quantile is called p).
    """
    check.no_autograd(NAME, x, model_output, table, out)
    prediction_is(NAME, x, model_output, table, step)
    if not 0 <= quantile <= 1:
        check.fail(NAME, "quantile", "a share", "0 <= quantile <= 1", quantile)
    if 0 in x.shape[1:]:
        check.fail(NAME, "x", "of at least one element a sample", "C, H, W > 0", list(x.shape))
    if out is None:
        out = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    else:
        check.shape_is(NAME, "out", out, "[N]", x.shape[:1])
        check.dtype_in(NAME, "out", out, (torch.float32,))
        check.device_is(NAME, "out", out, x.device)
        if not out.is_contiguous():
            check.fail(NAME, "out", "contiguous", "stride 1", f"stride {out.stride(0)}")
        read = {"x": x, "model_output": model_output, "table": table}
        check.all_apart(NAME, {"out": out}, read | ({"step": step} if isinstance(step, Tensor) else {}))
    if x.shape[0]:
        OP.run(x.device, model_output.dtype, x, model_output, table, step, quantile, out)
    return out


def _nhwc_only(
    x: Tensor, model_output: Tensor, table: Tensor, step: int | Tensor, quantile: float, out: Tensor
) -> str | None:
    for name, tensor in (("x", x), ("model_output", model_output)):
        if not check.is_nhwc(tensor):
            return f"takes channels_last tensors, {name} is not"
    return None


def _triton_limits(x: Tensor, *rest: Any) -> str | None:
    if x.numel() // x.shape[0] > MOST_ELEMENTS:
        return f"takes at most {MOST_ELEMENTS} elements a sample"
    return _nhwc_only(x, *rest)


OP = Op(
    NAME,
    "max(1, quantile of |x0_hat|)",
    [
        Backend(
            "triton",
            f"{__name__}.triton_kernel:dynamic_threshold",
            frozenset({"cuda", "cpu"}),
            FLOATS,
            min_capability=(8, 0),
            limits=_triton_limits,
            condition=triton_condition,
        ),
        Backend(
            "cuda",
            f"{__name__}.cuda:dynamic_threshold",
            frozenset({"cuda"}),
            FLOATS,
            min_capability=(8, 0),
            limits=_nhwc_only,
        ),
        Backend("cpu", f"{__name__}.native:dynamic_threshold", frozenset({"cpu"}), FLOATS, limits=_nhwc_only),
        Backend("torch", f"{__name__}.torch_backend:dynamic_threshold", frozenset({"cpu", "cuda"}), FLOATS),
        Backend("reference", f"{__name__}.reference:dynamic_threshold", frozenset({"cpu", "cuda"}), FLOATS),
    ],
)
