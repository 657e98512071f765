"""CPU kernel: csrc/resample2x."""

from __future__ import annotations

import torch
from torch import Tensor

from idm_fast.kernels.extension import Prepared, binder, require_native, view

native = require_native()


def prepare(
    x: Tensor,  # [N, C, H, W] channels_last
    up: bool,
    out: Tensor,  # [N, C, 2H, 2W] or [N, C, H / 2, W / 2] channels_last
) -> Prepared:
    return Prepared((view(x), up, view(out), torch.get_num_threads()))


def resample2x(x: Tensor, up: bool, out: Tensor) -> None:
    native.resample2x(*prepare(x, up, out).arguments)


resample2x.bind = binder(native.resample2x, prepare)  # type: ignore[attr-defined]  # what dispatch.bound asks for
