"""CPU kernel: csrc/sampler_update."""

from __future__ import annotations

import torch
from torch import Tensor

from idm_fast.kernels.extension import optional_view, require_native, view

native = require_native()


def sampler_update(
    x: Tensor,  # [N, C, H, W] channels_last
    model_output: Tensor,  # [N, C, H, W] channels_last
    history: Tensor,  # [N, C, H, W] channels_last
    table: Tensor,  # [T, 8]
    step: int | Tensor,
    seeds: Tensor,  # [N]
    network_input: Tensor | None = None,  # [N, C f^2, H / f, W / f] channels_last, or channels of such a tensor
    threshold: Tensor | None = None,  # [N]
    unshuffle: int = 1,
) -> None:
    if isinstance(step, Tensor):
        step = min(max(int(step), 0), table.shape[0] - 1)
    native.sampler_update(
        view(x),
        view(model_output),
        view(history),
        view(table),
        step,
        view(seeds),
        optional_view(network_input),
        optional_view(threshold),
        unshuffle,
        torch.get_num_threads(),
    )
