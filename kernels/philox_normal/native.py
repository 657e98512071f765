"""CPU kernel: csrc/sampler_update, whose noise this is."""

from __future__ import annotations

import torch
from torch import Tensor

from idm_fast.kernels.extension import Prepared, binder, require_native, view

native = require_native()


def prepare(
    seeds: Tensor,  # [N] int64
    shape: tuple[int, int, int, int],  # N, C, H, W
    step: int,
) -> Prepared:
    # The defaults that a user may have set (torch.set_default_dtype, set_default_device) must not come in here.
    out = torch.empty(shape, dtype=torch.float32, device=seeds.device, memory_format=torch.channels_last)
    return Prepared((view(out), view(seeds), step, torch.get_num_threads()), out)


def philox_normal(seeds: Tensor, shape: tuple[int, int, int, int], step: int) -> Tensor:
    call = prepare(seeds, shape, step)
    native.philox_normal(*call.arguments)
    result: Tensor = call.result
    return result


philox_normal.bind = binder(native.philox_normal, prepare)  # type: ignore[attr-defined]  # what dispatch.bound asks for
