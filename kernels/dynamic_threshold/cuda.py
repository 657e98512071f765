"""CUDA kernel: csrc/dynamic_threshold/dynamic_threshold.cu."""

from __future__ import annotations

from torch import Tensor

from idm_fast.kernels.extension import cuda_stream, optional_view, require_cuda, view

native = require_cuda()


def dynamic_threshold(
    x: Tensor,  # [N, C, H, W] channels_last
    model_output: Tensor,  # [N, C, H, W] channels_last
    table: Tensor,  # [T, 8]
    step: int | Tensor,
    quantile: float,
    out: Tensor,  # [N]
) -> Tensor:
    counter = step.reshape(1) if isinstance(step, Tensor) else None
    row = 0 if isinstance(step, Tensor) else step
    native.dynamic_threshold_cuda(
        view(x), view(model_output), view(table), row, optional_view(counter), quantile, view(out), cuda_stream(x)
    )
    return out
