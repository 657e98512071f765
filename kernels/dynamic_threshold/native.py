"""CPU kernel: csrc/dynamic_threshold."""

from __future__ import annotations

import torch
from torch import Tensor

from idm_fast.kernels.extension import Prepared, binder, optional_view, require_native, view

native = require_native()


def prepare(
    x: Tensor,  # [N, C, H, W] channels_last
    model_output: Tensor,  # [N, C, H, W] channels_last
    table: Tensor,  # [T, 8]
    step: int | Tensor,
    quantile: float,
    out: Tensor,  # [N]
) -> Prepared:
    counter = step.reshape(1) if isinstance(step, Tensor) else None
    row = 0 if isinstance(step, Tensor) else step
    images, threads = (view(x), view(model_output)), torch.get_num_threads()
    return Prepared((*images, view(table), row, optional_view(counter), quantile, view(out), threads), out)


def dynamic_threshold(
    x: Tensor, model_output: Tensor, table: Tensor, step: int | Tensor, quantile: float, out: Tensor
) -> Tensor:
    native.dynamic_threshold(*prepare(x, model_output, table, step, quantile, out).arguments)
    return out


dynamic_threshold.bind = binder(native.dynamic_threshold, prepare)  # type: ignore[attr-defined]  # what dispatch.bound asks for
