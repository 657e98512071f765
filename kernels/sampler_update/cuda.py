"""CUDA kernel: csrc/sampler_update/sampler_update.cu."""

from __future__ import annotations

from torch import Tensor

from idm_fast.kernels.extension import cuda_stream, optional_view, require_cuda, view

native = require_cuda()


def sampler_update(
    x: Tensor,  # [N, C, H, W] channels_last
    model_output: Tensor,  # [N, C, H, W] or [N, C f^2, H / f, W / f] channels_last
    history: Tensor,  # [N, C, H, W] channels_last
    table: Tensor,  # [T, 8]
    step: int | Tensor,
    seeds: Tensor,  # [N]
    network_input: Tensor | None = None,  # [N, C f^2, H / f, W / f] channels_last, or channels of such a tensor
    threshold: Tensor | None = None,  # [N]
    unshuffle: int = 1,
    base: Tensor | None = None,  # [N, C, H, W] channels_last
) -> None:
    native.sampler_update_cuda(
        view(x),
        view(model_output),
        view(history),
        view(table),
        0 if isinstance(step, Tensor) else step,
        view(step.reshape(1)) if isinstance(step, Tensor) else None,
        view(seeds),
        optional_view(network_input),
        optional_view(threshold),
        optional_view(base),
        unshuffle,
        cuda_stream(x),
    )
