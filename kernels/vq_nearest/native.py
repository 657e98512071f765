"""CPU kernel: csrc/vq_nearest."""

from __future__ import annotations

import torch
from torch import Tensor

from idm_fast.kernels.extension import Prepared, binder, require_native, view

native = require_native()


def prepare(z: Tensor, codebook: Tensor, codes: Tensor, quantised: Tensor) -> Prepared:
    return Prepared((view(z), view(codebook), view(codes), view(quantised), torch.get_num_threads()))


def vq_nearest(z: Tensor, codebook: Tensor, codes: Tensor, quantised: Tensor) -> None:
    native.vq_nearest(*prepare(z, codebook, codes, quantised).arguments)


vq_nearest.bind = binder(native.vq_nearest, prepare)  # type: ignore[attr-defined]  # what dispatch.bound asks for
